"""`nsa generate` on folders that hold something else than a whole model: one line, never random weights."""

import io
import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from nsa.eval.models import load
from nsa.models import NSALlamaConfig, NSALlamaForCausalLM
from nsa.training.generation import GenerateConfig, generate
from nsa.training.info import InfoConfig, info
from nsa.training.tokenizer import byte_tokenizer

pytestmark = pytest.mark.filterwarnings("default")  # transformers' own


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    config = NSALlamaConfig(
        vocab_size=259, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    NSALlamaForCausalLM(config).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def folder(model, tmp_path):
    return shutil.copytree(model, tmp_path / "model")


def refused(folder, message, **change):
    with pytest.raises(ValueError, match=message) as caught:
        generate(replace(GenerateConfig(model=folder, prompt="def", max_new_tokens=2, device="cpu"), **change))
    assert "\n" not in str(caught.value)


def test_a_whole_model_generates(folder):
    generate(GenerateConfig(model=folder, prompt="def", max_new_tokens=2, device="cpu"))


def test_weights_that_are_not_there_are_not_replaced_by_random_ones(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    save_file({f"other.{name}": tensor for name, tensor in weights.items()}, path, {"format": "pt"})
    refused(folder, r"lacks weights of the model in its config.json: \d+ \(")
    save_file({name: tensor for name, tensor in weights.items() if "o_proj" not in name}, path, {"format": "pt"})
    refused(folder, r"lacks weights .*: 1 \(model.layers.0.self_attn.o_proj.weight\)")
    save_file(weights | {"model.layers.1.extra": torch.zeros(3)}, path, {"format": "pt"})
    refused(folder, r"has weights that the model in its config.json does not: 1 \(model.layers.1.extra\)")
    save_file(weights | {"model.norm.weight": torch.zeros(3)}, path, {"format": "pt"})
    refused(folder, "has weights of other shapes than its config.json: 1 .model.norm.weight")


def change(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_another_kind_of_model_with_these_weights_is_not_run(folder):
    change(folder, model_type="llama", architectures=["LlamaForCausalLM"])
    refused(folder, "has weights that the model in its config.json does not")
    change(folder, model_type="bert")
    refused(folder, "lacks weights|no model could be loaded")


@pytest.mark.parametrize(
    "values",
    [{"hidden_size": "wide"}, {"hidden_size": -16}, {"num_hidden_layers": [1]}, {"nsa": 3}, {"model_type": 7},
     {"vocab_size": None}, {"nsa": {"window": 3}}],
)  # fmt: skip
def test_a_configuration_of_wrong_types_is_one_line_in_generate_and_info(folder, values):
    change(folder, **values)
    refused(folder, "model")
    with pytest.raises(ValueError, match=r"config\.json") as caught:
        info(InfoConfig(model=str(folder)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["bos_token_id", "eos_token_id", "pad_token_id"])
@pytest.mark.parametrize("value", ["x", "", {"x": 1}, [None], 1.5])
def test_a_generation_config_whose_tokens_are_no_numbers_is_one_line(folder, name, value):
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    refused(folder, f"{name} should be|no model could be loaded")


def test_info_says_of_an_unknown_rope_type_that_it_makes_no_model(folder):
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "x", "rope_theta": 1e4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="makes no model: KeyError: 'x'"):
        info(InfoConfig(model=str(folder)))


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"null"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_damaged_file_is_one_line(folder, name, content):
    (folder / name).write_bytes(content)
    refused(folder, "no model could be loaded|no tokenizer could be loaded")
    if name == "config.json":
        with pytest.raises(ValueError, match=r"config\.json") as caught:
            info(InfoConfig(model=str(folder)))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["long", {"x": 1}, []])
def test_a_tokenizers_configuration_of_wrong_types_is_one_line(folder, value):
    """transformers loads it, and stumbles over it when it is used."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": value}))
    refused(folder, "no tokenizer could be loaded from")
    with pytest.raises(
        ValueError, match=r"could not be loaded as a causal language model: '>' not supported"
    ) as caught:
        load(folder, name="a")
    assert "\n" not in str(caught.value)


def test_a_torn_weights_file_is_one_line(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(folder, "no model could be loaded")


def test_a_folders_own_code_is_not_run_unless_asked_for(folder, tmp_path):
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: ...\n")
    change(folder, model_type="evil", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"})
    refused(folder, "no (model|tokenizer) could be loaded")
    assert not (tmp_path / "ran").exists()


def test_a_prompt_that_is_not_utf_8_is_one_line(folder, monkeypatch):
    refused(folder, "the prompt is not UTF-8 text", prompt="caf\udce9")  # as the shell's bytes reach Python
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), "utf-8"))
    refused(folder, "the prompt is not UTF-8 text", prompt="-")


def test_a_device_that_is_not_there_is_not_replaced(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(folder, "--device cuda: torch sees no CUDA device here", device="cuda")
