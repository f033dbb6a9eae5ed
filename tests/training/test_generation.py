"""`nsa generate`: the same text each time, streamed text equals the returned one, prompts from standard input."""

import io
import json
import shutil
from dataclasses import replace

import pytest
import torch

from nsa.models import NSALlamaConfig, NSALlamaForCausalLM
from nsa.training.generation import GenerateConfig, generate
from nsa.training.tokenizer import byte_tokenizer

pytestmark = pytest.mark.filterwarnings("default")  # transformers' own


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    sizes = {"compress_block_size": 4, "compress_stride": 2, "select_block_size": 4, "num_selected_blocks": 4}
    config = NSALlamaConfig(
        nsa=sizes | {"window_size": 8},
        vocab_size=259,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
    )
    model = NSALlamaForCausalLM(config)
    model.lm_head.weight.data[128:] = 0.0  # ASCII only, which decodes as it streams
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def config(folder):
    return GenerateConfig(model=folder, prompt="def f(", max_new_tokens=20, device="cpu")


def test_the_prompt_and_its_continuation_are_written_as_they_come(config, capsys):
    text = generate(config)
    assert len(text) == 20
    assert capsys.readouterr().out.rstrip("\n") == ("def f(" + text).rstrip("\n")


@pytest.mark.parametrize("change", [{}, {"temperature": 0.8, "top_p": 0.9}, {"num_beams": 3}])
def test_the_same_seed_gives_the_same_text(config, change):
    config = replace(config, **change)
    assert generate(config) == generate(config)


def test_another_seed_gives_another_sample(config):
    config = replace(config, temperature=2.0)
    assert generate(config) != generate(replace(config, seed=1))


def test_a_dash_reads_the_prompt_from_standard_input(config, monkeypatch):
    expected = generate(config)
    monkeypatch.setattr("sys.stdin", io.StringIO("def f("))
    assert generate(replace(config, prompt="-")) == expected


def test_a_prompt_in_chunks_gives_the_same_text_and_how_it_went_is_said_aside(config, capsys):
    expected = generate(config)
    assert generate(replace(config, prefill_chunk=3)) == expected
    assert generate(replace(config, prefill_chunk=0)) == expected
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3
    assert all(
        line.startswith("6 tokens read, 20 made in ") and line.endswith("; no CUDA graphs: the model is on cpu")
        for line in said
    )


def test_tokens_beyond_the_models_positions_are_said_once(config, folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "short")
    values = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 16}
    (tmp_path / "short" / "config.json").write_text(json.dumps(values))
    generate(replace(config, model=tmp_path / "short"))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("; 10 tokens are beyond the 16 positions it was made for")


def test_top_p_without_a_temperature_is_refused(config):
    with pytest.raises(ValueError, match="top_p is of sampling: expected a temperature above 0 beside it"):
        generate(replace(config, top_p=0.5))


def test_an_empty_prompt_starts_from_the_beginning_of_text(config):
    assert len(generate(replace(config, prompt=""))) == 20


@pytest.mark.parametrize(
    "change", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 1.5}, {"num_beams": 0}, {"prefill_chunk": -1}]
)
def test_values_out_of_range_are_one_line(config, change):
    with pytest.raises(ValueError, match=r"should be at least|should be between") as caught:
        generate(replace(config, **change))
    assert "\n" not in str(caught.value)
