"""What cannot be swapped is one line that says why."""

import pytest
import torch
from dense_families import DENSE, NSA, SIZES, dense
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from nsa.models import NSALlamaConfig, NSALlamaForCausalLM, swap_attention
from nsa.models.families import why_not
from nsa.models.swap import check_config

LLAMA = LlamaConfig(**SIZES)


def rope(kind, **more):
    return {"rope_type": kind, "rope_theta": 1000.0, **more}


def phi3(**more):
    return Phi3ForCausalLM(Phi3Config(**SIZES, **more))


def quantized():
    model = DENSE["llama"]()
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    return model


def with_sinks():
    model = DENSE["llama"]()
    model.model.layers[0].self_attn.sinks = torch.nn.Parameter(torch.zeros(4))
    return model


def on_two_devices():
    model = DENSE["llama"]()
    model.lm_head.to("meta")
    return model


def with_adapters():
    model = DENSE["llama"]()
    model.peft_config = {}
    return model


@pytest.mark.parametrize(
    ("make", "arguments", "said"),
    [
        (lambda: GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=8)), {},
         r"no row for model type 'gpt2' in nsa.models.families.FAMILIES, which has llama, .*; docs/convert.md"),
        (lambda: LlamaForQuestionAnswering(LLAMA), {}, "expected one of transformers' Llama models, got LlamaForQ"),
        (DENSE["llama"], {"method": "quest"}, "method should be one of nsa, infllm_v2, got 'quest'"),
        (lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_dropout=0.1)), {},
         "llama: NSA has no dropout; expected attention_dropout=0, got 0.1"),
        (lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8)), {},
         "gemma2: NSA has no softcapping of scores; expected none, got 50.0"),
        (lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)), {},
         r"layers \[0, 1\] attend within a window of 8 tokens; so no layer can be sparse"),
        (DENSE["gemma3"], {"layers": [0, 1]},
         r"layers \[0\] attend within a window of 8 tokens; only layers \[1\] can be sparse"),
        (lambda: phi3(sliding_window=None, rope_parameters=rope("default", partial_rotary_factor=0.5)), {},
         "NSA rotates whole heads; expected partial_rotary_factor=1, got 0.5"),
        (lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=rope("dynamic", factor=2.0))), {},
         "rotary embeddings of type 'dynamic' change with the length"),
        (lambda: NSALlamaForCausalLM(NSALlamaConfig(**SIZES, nsa=NSA)), {}, "attention='nsa' already; expected"),
        (quantized, {}, "the weights are quantized"),
        (with_sinks, {}, "the weight model.layers.0.self_attn.sinks has no place in NSALlamaForCausalLM"),
        (on_two_devices, {}, "expected all weights on one device, got cpu, meta"),
        (with_adapters, {}, "the model has adapters; merge them first"),
        (DENSE["llama"], {"gate_bias": float("inf")}, "gate_bias: expected a finite number, got inf"),
        (DENSE["llama"], {"layers": [2]}, r"layers: expected some of 0 to 1, got \[2\]"),
        (DENSE["llama"], {"layers": []}, "layers: expected some of 0 to 1"),
        (DENSE["llama"], {"layers": {"dense": [0, 1]}}, "layers: expected some of 0 to 1"),
        (DENSE["llama"], {"layers": {"sparse": [0]}}, r"layers: expected numbers, or \{'dense': numbers\}"),
        (DENSE["llama"], {"infllm_v2": {"topk": 3}}, "sizes of another method than 'nsa' were given"),
        (DENSE["llama"], {"nsa": {"window": 3}}, r"unknown keys \['window'\]"),
    ],
)  # fmt: skip
def test_what_cannot_be_swapped_is_one_line(make, arguments, said):
    with pytest.raises(ValueError, match=said) as caught:
        swap_attention(make(), **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (GptOssConfig(num_hidden_layers=2), "no row for model type 'gpt_oss' .*; docs/convert.md says how to add one"),
        (Gemma3Config(), "no row for model type 'gemma3' .*; its text part is 'gemma3_text', give that alone"),
    ],
    ids=["sinks", "images"],
)
def test_a_model_type_without_a_row_is_one_line(config, said):
    with pytest.raises(ValueError, match=said) as caught:
        check_config(config)
    assert "\n" not in str(caught.value)


def test_a_window_that_no_position_reaches_is_none():
    model = swap_attention(phi3(sliding_window=4096), nsa=NSA)
    assert (model.config.sliding_window, model.config.sparse_layers) == (None, [0, 1])


def test_attention_in_both_directions_and_of_two_texts_is_refused():
    both = Gemma3TextConfig(**SIZES, head_dim=8, use_bidirectional_attention=True)
    assert why_not(both, [1]) == "NSA is causal; expected use_bidirectional_attention=False, got True"
    crossed = LlamaConfig(**SIZES, add_cross_attention=True)
    assert why_not(crossed, [0]) == "NSA has no cross-attention; expected a decoder alone"


@pytest.mark.parametrize("dense_layers", [[0, 1], [2], [0, 0]])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_layers_that_are_none_are_refused_by_the_configuration(family, dense_layers):
    config = swap_attention(dense(family), nsa=NSA).config
    with pytest.raises(ValueError, match=r"dense_layers: expected some of the layers 0 to 1, each once"):
        type(config)(**{**config.to_dict(), "dense_layers": dense_layers})
    with pytest.raises(ValueError, match="has no weights to return"):
        swap_attention(dense("qwen3"), nsa=NSA)(input_ids=dense("qwen3").dummy_inputs["input_ids"] % 48,
                                                output_attentions=True)  # fmt: skip
