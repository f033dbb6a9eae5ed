"""The selector's figures: no choice keeps more than the best, and what has no choice is refused in one line."""

import importlib.util
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from nsa.models import NSALlamaConfig, NSALlamaForCausalLM
from nsa.training.tokenizer import byte_tokenizer

FILE = Path(__file__).parents[2] / "benchmarks" / "selector_quality.py"
SPEC = importlib.util.spec_from_file_location("selector_quality", FILE)
quality = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(quality)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tokenizer = byte_tokenizer()
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    blocks = {"compress_block_size": 8, "compress_stride": 4, "select_block_size": 8, "num_selected_blocks": 5}
    for name, more in {"nsa": {}, "hybrid": {"dense_layers": [0]}, "dense": {"attention": "dense"}}.items():
        torch.manual_seed(0)
        config = NSALlamaConfig(nsa=blocks, intermediate_size=32, vocab_size=len(tokenizer), **sizes, **more)
        NSALlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "text").mkdir()
    (folder / "text" / "a.txt").write_text("".join(f"line {i} of the text\n" for i in range(400)))
    return folder


def asked(models, *names, length=128):
    paths = [models / name for name in names]
    return Namespace(models=paths, text=models / "text", length=length, samples=2, device="cpu")


def test_what_is_kept_lies_between_nothing_and_the_best_of_every_layer_with_a_choice(models):
    found = quality.compare(asked(models, "nsa", "hybrid"))
    assert {name: len(layers) for name, layers in found.items()} == {"nsa": 2, "hybrid": 1}
    for figures in (layer for layers in found.values() for layer in layers):
        assert 0 < figures["kept"] <= figures["best"] <= 1
        assert 5 <= figures["u4"] <= 20


def test_where_every_block_is_selected_four_neighbours_select_those_that_they_see(models):
    (figures, _), *_ = quality.compare(asked(models, "nsa", length=32)).values()
    assert figures["u4"] == (3 + 4) / 2  # of queries 16 to 23 and 24 to 31, blocks of 8


def test_a_model_or_a_length_without_a_choice_is_refused(models):
    with pytest.raises(ValueError, match="dense: expected a model with attention='nsa', got 'dense'"):
        quality.compare(asked(models, "dense"))
    with pytest.raises(ValueError, match="--length: expected more than the 24 tokens of forced blocks, got 24"):
        quality.compare(asked(models, "nsa", length=24))
