"""`nsa info`: its numbers against tensors that are really made, and its one-line errors."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nsa.cli import main
from nsa.models import NSALlamaCache, NSALlamaConfig, NSALlamaForCausalLM
from nsa.models.captured_step import CapturedStep
from nsa.models.plan import plan
from nsa.training.info import InfoConfig, info

CONFIG = NSALlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, tie_word_embeddings=False,
    nsa={"compress_block_size": 8, "compress_stride": 4, "select_block_size": 8, "num_selected_blocks": 4,
         "window_size": 16},
)  # fmt: skip


@pytest.mark.parametrize("attention", ["nsa", "dense"])
def test_parameters_and_cache_are_those_of_the_model_and_of_what_it_allocates(attention):
    model = NSALlamaForCausalLM(NSALlamaConfig(**{**CONFIG.to_dict(), "attention": attention})).eval()
    found = plan(CONFIG, context=200, batch=2, chunk=50, dtype=torch.float32)["NSA" if attention == "nsa" else "dense"]
    total = sum(parameter.numel() for parameter in model.parameters())
    assert (found.parameters, found.weight_bytes) == (total, 4 * total)
    ids = torch.ones(2, 200, dtype=torch.long)
    with torch.no_grad():
        if attention == "nsa":
            cache = NSALlamaCache(CONFIG, layout="static", max_length=200)
            model(ids, past_key_values=cache)
            assert sum(found.cache_bytes.values()) == cache.num_bytes()
            layers = CapturedStep(model, cache, masked=False, capture=False).decoder.layers
            biases = sum(layer.inputs.bias.numel() for layer in layers)
            assert found.packed_bytes == 4 * (layers[0].inputs.weight.numel() + biases)
            assert sum(parameter.numel() for parameter in model.parameters()) == total
        else:
            cache = model(ids).past_key_values
            assert sum(found.cache_bytes.values()) == sum(
                x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values)
            )


def test_a_step_reads_the_weights_once_and_the_keys_that_its_queries_see():
    found = plan(CONFIG, context=1000, batch=5, chunk=50, dtype=torch.bfloat16)
    pair = 2 * 2 * 8 * 2 * 3  # k and v, two heads of 8, two bytes, three layers
    keys = {"NSA": (1000 - 8) // 4 + 1 + 4 * 8 + 16, "dense": 1000}
    for name, one in found.items():
        assert one.keys_per_query == keys[name]
        assert one.step_bytes == (one.parameters - 64 * 32) * 2 + pair * keys[name] * 5
    assert found["dense"].cache_bytes_per_token == pair
    assert found["NSA"].cache_bytes_per_token == pair * 1.25


def test_infllm_v2_reads_pooled_keys_without_values_and_only_where_it_has_to_choose():
    sizes = {"kernel_size": 8, "kernel_stride": 4, "block_size": 8, "window_size": 8, "topk": 3, "dense_len": 100}
    config = NSALlamaConfig(**{**CONFIG.to_dict(), "attention": "infllm_v2", "infllm_v2": sizes})
    pair = 2 * 2 * 8 * 2 * 3
    for context, keys, pairs in [(100, 100, 100), (1000, 249 + 4 * 8, 249 / 2 + 4 * 8)]:
        found = plan(config, context=context, batch=5, chunk=50, dtype=torch.bfloat16)
        one, dense = found["InfLLM-V2"], found["dense"]
        assert one.parameters == dense.parameters
        assert one.keys_per_query == keys
        assert one.step_bytes == (one.parameters - 64 * 32) * 2 + pair * pairs * 5
        assert one.cache_bytes_per_token == pair * 1.25


def test_layers_that_stay_dense_are_counted_as_the_dense_twins():
    half = NSALlamaConfig(**{**CONFIG.to_dict(), "dense_layers": [1]})
    mixed, whole = (plan(c, context=1000, batch=5, chunk=50, dtype=torch.float32) for c in (half, CONFIG))
    assert mixed["dense"] == whole["dense"]
    found, sparse, dense = mixed["NSA"], whole["NSA"], whole["dense"]
    assert found.parameters == sum(parameter.numel() for parameter in NSALlamaForCausalLM(half).parameters())
    assert found.keys_per_query == round((2 * sparse.keys_per_query + 1000) / 3)
    assert found.cache_bytes["dense layers: all keys and values"] == dense.cache_bytes["keys and values"] / 3
    caches = [sum(one.cache_bytes.values()) for one in (found, sparse, dense)]
    assert 3 * caches[0] == 2 * caches[1] + caches[2]
    of_keys = [one.step_bytes - (one.parameters - 64 * 32) * 4 for one in (found, sparse, dense)]
    assert 3 * of_keys[0] == 2 * of_keys[1] + of_keys[2]
    assert found.packed_bytes == 0


def test_tied_embeddings_are_counted_and_read_once():
    tied = NSALlamaConfig(**{**CONFIG.to_dict(), "tie_word_embeddings": True})
    one, other = (plan(c, context=10, batch=1, chunk=5, dtype=torch.float32)["dense"] for c in (tied, CONFIG))
    assert one.parameters == other.parameters - 64 * 32
    assert one.step_bytes == other.step_bytes


def test_presets_folders_and_llamas_have_plans(tmp_path):
    found = info(InfoConfig(model="1b", context=65536, batch=8))
    assert found["plans"]["NSA"]["keys_per_query"] == 5631
    assert 0.9e9 < found["plans"]["dense"]["parameters"] < 1.1e9
    assert found["plans"]["NSA"]["step_ms"] == pytest.approx(found["plans"]["NSA"]["step_bytes"] / 4800e9 * 1e3)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8,
        )
    ).bfloat16().save_pretrained(tmp_path)  # fmt: skip
    found = info(InfoConfig(model=str(tmp_path), context=4096, bandwidth=100.0))
    assert (found["dtype"], found["gpu"], found["memory_bytes"]) == ("bfloat16", None, None)
    assert found["plans"]["dense"]["cache_bytes_per_token"] == 2 * 2 * 8 * 2 * 3


def test_the_command_prints_a_table_or_json(capsys):
    assert main(["info", "demo", "--context", "512"]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("keys read per query", "milliseconds per step", "NSA fits, dense fits"))
    assert main(["info", "demo", "--context", "512", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["context"] == 512


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere"], "/nowhere holds no model: expected a folder with config.json, or a preset of demo, small, 1b"),
        (["demo", "--gpu", "abacus"], "--gpu: expected one of 'A100-40GB'"),
        (["demo", "--context", "0"], "context should be at least 1, got 0"),
        (["demo", "--bandwidth", "-1"], "bandwidth should be at least 0, got -1.0"),
    ],
)
def test_a_wrong_argument_is_one_line(arguments, message, capsys):
    assert main(["info", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_another_kind_of_model_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="expected a model of type llama or nsa_llama, got 'gpt2'"):
        info(InfoConfig(model=str(tmp_path)))
