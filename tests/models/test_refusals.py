"""What this model cannot do is refused in one line, never ignored; and its flags say so."""

import re

import pytest
import torch
from tiny_llama import TWINS, config, model, tokens
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM

from nsa.models import NSALlamaForCausalLM, NSALlamaModel

OTHERS = ("nsa", "window")


def refused(message):
    """A ValueError of this one line, message a pattern of all of it."""
    return pytest.raises(ValueError, match=rf"\A{message}\Z")


BATCHES = {
    "generate_batch()": lambda built: built.generate_batch([[3, 4, 5]]),
    "init_continuous_batching()": lambda built: built.init_continuous_batching(),
    "cache_implementation='paged'": lambda built: built.generate(tokens(1, 4), cache_implementation="paged"),
    "as a config": lambda built: built.generate(
        tokens(1, 4), generation_config=GenerationConfig(cache_implementation="paged")
    ),
}


@pytest.mark.parametrize("attention", TWINS)
@pytest.mark.parametrize("way", BATCHES)
def test_continuous_batching_is_refused(attention, way):
    name = r".*" if way == "as a config" else re.escape(way)
    built = model(attention)
    line = rf"{name}: continuous batching is not served by this model and its twins; expected generate\(\)"
    with refused(line):
        BATCHES[way](built)
    assert built.generate(tokens(1, 4), max_new_tokens=2).shape == (1, 6)


FLAGS = ("_supports_attention_backend", "_supports_flash_attn", "_supports_flex_attn", "_supports_sdpa")


@pytest.mark.parametrize("flag", FLAGS)
def test_flags_of_replaceable_attention_are_true_of_the_dense_twin_alone(flag):
    for one in (NSALlamaForCausalLM, NSALlamaModel):
        assert getattr(one, flag) is False
    assert not NSALlamaForCausalLM.is_backend_compatible()
    for attention in TWINS:
        built = model(attention)
        expected = attention == "dense" and getattr(LlamaForCausalLM, flag)
        assert getattr(built, flag) is getattr(built.model, flag) is expected


@pytest.mark.parametrize("attention", OTHERS)
@pytest.mark.parametrize("name", ["nonsense", "eager", "sdpa", "flash_attention_2", "paged|sdpa"])
def test_another_attention_implementation_is_refused(attention, name, tmp_path):
    line = rf"attention='{attention}' has its own implementation: expected .*=None, got '{name}'".replace("|", r"\|")
    with refused(line):
        NSALlamaForCausalLM(config(attention, attn_implementation=name))
    built = model(attention)
    with refused(line):
        built.set_attn_implementation(name)
    built.save_pretrained(tmp_path)
    with refused(line):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)
    again = NSALlamaForCausalLM(built.config)  # which holds the implementation's own name by now
    assert again.config._attn_implementation == built.config._attn_implementation


def test_the_dense_twin_takes_llamas_implementations_and_not_its_twins():
    expected = None
    for name in ("eager", "sdpa", None):
        built = model("dense", attn_implementation=name)
        with torch.no_grad():
            logits = built(tokens(2, 30)).logits.float()  # "eager" computes its softmax in fp32
        expected = logits if expected is None else expected
        torch.testing.assert_close(logits, expected)
    for name in ("nsa", "nsa_window"):
        with refused(f"attention='dense' .*, got '{name}'"):
            NSALlamaForCausalLM(config("dense", attn_implementation=name))
    with pytest.raises(ValueError, match="nonsense"):
        NSALlamaForCausalLM(config("dense", attn_implementation="nonsense"))


@pytest.mark.parametrize("attention", TWINS)
def test_attention_weights_are_refused_where_there_are_none(attention):
    line = rf"output_attentions=True: expected attention='dense' .*'eager', .*; got '{attention}' with .*"
    built, ids = model(attention), tokens(1, 12)
    for call in (
        lambda: config(attention, output_attentions=True),
        lambda: built(ids, output_attentions=True),
        lambda: built.model(ids, output_attentions=True),
        lambda: built.generate(ids, max_new_tokens=2, output_attentions=True, return_dict_in_generate=True),
    ):
        with refused(line):
            call()
    dense = model("dense", attn_implementation="eager")
    assert dense(ids, output_attentions=True).attentions[0].shape == (1, 4, 12, 12)


IGNORED = {
    "sliding_window": 128,
    "use_sliding_window": True,
    "use_qk_norm": True,
    "attn_logit_softcapping": 30.0,
    "layer_types": ["full_attention", "full_attention"],
    "hidden_dropout_prob": 0.1,
    "dropout": 0.1,
    "no_rope_layers": [1, 0],
    "attention_multiplier": 0.5,
}


@pytest.mark.parametrize("attention", TWINS)
@pytest.mark.parametrize("key", IGNORED)
def test_another_familys_option_is_refused_when_made_and_when_set_later(attention, key):
    line = rf"NSALlamaConfig: this model would ignore {key}=.*; expected no such option"
    with refused(line):
        config(attention, **{key: IGNORED[key]})
    later = config(attention)
    setattr(later, key, IGNORED[key])
    with refused(line):
        NSALlamaForCausalLM(later)


def test_options_that_ask_for_nothing_and_labels_of_ones_own_are_taken():
    made = config(
        sliding_window=None, use_sliding_window=False, attention_dropout=0.0, note="mine", is_llama_config=True
    )
    assert made.note == "mine"
    again = type(made)(**made.to_dict())
    assert again.to_dict() == made.to_dict()


def test_dropout_is_refused_where_there_is_none():
    for attention in OTHERS:
        with refused(f"NSALlamaConfig: attention='{attention}' has no dropout; expected attention_dropout=0, got 0.5"):
            config(attention, attention_dropout=0.5)
    built, ids = model("dense", attention_dropout=0.5).train(), tokens(1, 20)
    assert not torch.equal(built(ids).logits, built(ids).logits)
