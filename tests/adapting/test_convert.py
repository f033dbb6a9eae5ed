"""`nsa convert`: from a folder to a folder, whole or not at all."""

import json
import shlex
import shutil
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from nsa.adapting import source
from nsa.adapting.arguments import layer_numbers
from nsa.cli import main
from nsa.models import NSALlamaConfig, NSALlamaForCausalLM
from nsa.training.tokenizer import byte_tokenizer

SIZES = {"vocab_size": 259, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 96}  # fmt: skip
FLAGS = ["--nsa.compress-block-size", "8", "--nsa.compress-stride", "4", "--nsa.select-block-size", "8",
         "--nsa.num-selected-blocks", "4", "--nsa.window-size", "10"]  # fmt: skip


def qwen3():
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)).to(torch.bfloat16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A sharded Qwen3 with its tokenizer and licence."""
    path = tmp_path_factory.mktemp("dense") / "qwen3"
    qwen3().save_pretrained(path, max_shard_size="20KB")
    byte_tokenizer().save_pretrained(path)
    (path / "LICENSE").write_text("whose it is")
    assert len(list(path.glob("*.safetensors"))) > 1
    return path


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("To be, or not to be, that is the question. " * 20)
    return path


def test_a_converted_folder_is_whole_and_says_what_was_done(folder, text, tmp_path, capsys):
    out = tmp_path / "new models" / "sparse"
    assert main(["convert", str(folder), str(out), *FLAGS, "--text", str(text), "--layers", "1"]) == 0
    said = capsys.readouterr().out
    dense, sparse = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, out))
    assert (sparse.dtype, sparse.config.dense_layers, sparse.config.nsa["window_size"]) == (torch.bfloat16, [0], 10)
    ids = AutoTokenizer.from_pretrained(out)(text.read_text()[:97], return_tensors="pt").input_ids
    losses = [
        torch.nn.functional.cross_entropy(model(ids).logits[0, :-1].float(), ids[0, 1:]).item()
        for model in (dense, sparse)
    ]
    record = json.loads((out / "conversion.json").read_text())
    assert record["layers"] == [1]
    assert record["loss"]["tokens"] == 96
    assert list(record["loss"]["all"].values()) == pytest.approx(losses, abs=1e-4)
    assert f"{losses[0]:.3f}" in said
    branch = 24 * 16  # a projection of k or v
    phi = 2 * (8 * 8 + (8 * 8 + 1) * 16 + (16 + 1) * 8)
    assert f"{4 * branch:,} are copies of k and v" in said
    assert f"{phi + 12 * 25:,} are new" in said
    assert {"LICENSE", "modeling_nsa.py", "tokenizer.json", "generation_config.json"} <= {p.name for p in out.iterdir()}
    assert [p.name for p in out.parent.iterdir()] == ["sparse"]
    (said_next,) = (shlex.split(line) for line in said.splitlines() if line.startswith("  nsa generate"))
    assert main([*said_next[1:], "--max-new-tokens", "2", "--device", "cpu"]) == 0


def test_the_weights_that_a_model_had_are_in_its_folder_as_they_were(folder, tmp_path):
    assert main(["convert", str(folder), str(tmp_path / "out"), *FLAGS, "--tokens", "0"]) == 0
    dense, sparse = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (folder, tmp_path / "out"))
    assert all(torch.equal(sparse[name], weight) for name, weight in dense.items())
    for name, weight in sparse.items():
        if name.endswith(("_cmp.weight", "_win.weight")):
            assert torch.equal(weight, sparse[name[: -len("_cmp.weight")] + ".weight"])


def test_the_number_format_is_that_of_the_weights_where_the_configuration_has_none(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "dense")
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("dtype") == "bfloat16"
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config))
    for flags, dtype in (([], torch.bfloat16), (["--dtype", "float16"], torch.float16)):
        out = tmp_path / str(dtype)
        assert main(["convert", str(tmp_path / "dense"), str(out), *FLAGS, "--tokens", "0", *flags]) == 0
        assert {weight.dtype for weight in load_file(out / "model.safetensors").values()} == {dtype}
        assert json.loads((out / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_a_hubs_cache_folder_is_a_folder(folder, tmp_path):
    cache = tmp_path / "models--org--qwen3"
    shutil.copytree(folder, cache / "snapshots" / "abc")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    assert main(["convert", str(cache), str(tmp_path / "out"), *FLAGS, "--tokens", "0"]) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_dense_twin_is_converted_with_its_own_sizes(tmp_path):
    nsa = {"compress_block_size": 8, "compress_stride": 4, "select_block_size": 8, "num_selected_blocks": 4,
           "window_size": 12}  # fmt: skip
    NSALlamaForCausalLM(NSALlamaConfig(**SIZES, attention="dense", nsa=nsa)).save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    assert main(["convert", str(tmp_path / "dense"), str(tmp_path / "out"), "--tokens", "0"]) == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (loaded.config.attention, loaded.config.nsa["window_size"]) == ("nsa", 12)
    in_cache = tmp_path / "models--some--twin" / "snapshots" / "abc"
    shutil.copytree(tmp_path / "dense", in_cache)
    assert main(["convert", str(in_cache.parent.parent), str(tmp_path / "out2"), "--tokens", "0"]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out2").config.nsa == loaded.config.nsa
    flags = ["--method", "infllm_v2", "--tokens", "0"]  # the twin's own sizes of NSA are in nobody's way
    assert main(["convert", str(tmp_path / "dense"), str(tmp_path / "out3"), *flags]) == 0


def test_infllm_v2_adds_no_weight(folder, tmp_path, capsys):
    flags = ["--method", "infllm_v2", "--infllm-v2.topk", "4", "--tokens", "0"]
    assert main(["convert", str(folder), str(tmp_path / "out"), *flags]) == 0
    dense, sparse = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (folder, tmp_path / "out"))
    assert dense.keys() == sparse.keys()
    assert all(torch.equal(sparse[name], weight) for name, weight in dense.items())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.infllm_v2["topk"] == 4
    assert main(["convert", str(folder), str(tmp_path / "other"), *flags, "--gate-bias", "3"]) == 2
    assert "--gate-bias: --method infllm_v2 has no gates" in capsys.readouterr().err
    assert main(["adapt", str(tmp_path / "out"), "--out", str(tmp_path / "run"), "--first", "64x1"]) == 2
    assert "--first: attention='infllm_v2' has no new weights to train" in capsys.readouterr().err


def broken(folder, **values):
    """The folder with other values in its config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


FAULTS = {
    "no model": (lambda path: (path / "config.json").unlink(), "holds no model: expected a folder with config.json"),
    "no JSON": (lambda path: (path / "config.json").write_text("{"), "config.json: It looks like the config file"),
    "unknown type": (lambda path: broken(path, model_type="no-such-model"), "config.json: "),
    "of another kind": (
        lambda path: GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=8)).save_pretrained(path),
        "no row for model type 'gpt2'",
    ),
    "quantized": (
        lambda path: broken(path, quantization_config={"quant_method": "gptq", "bits": 4}), "the weights are quantized",
    ),
    "layers and their kinds apart": (
        lambda path: broken(path, num_hidden_layers=3), "`num_hidden_layers` (3) must be equal to the number of",
    ),
    "no tokenizer": (
        lambda path: [file.unlink() for file in path.glob("tokenizer*")], "it has special tokens alone",
    ),
    "an adapter": (
        lambda path: (path / "config.json").rename(path / "adapter_config.json"), "holds no model: an adapter alone",
    ),
    "nothing": (lambda path: shutil.rmtree(path), "holds no model: there is no such folder, and nothing is downloaded"),
    "dropout": (lambda path: broken(path, attention_dropout=0.5), "qwen3: NSA has no dropout"),
    "code of its own": (
        lambda path: broken(path, model_type="mine", auto_map={"AutoConfig": "mine.Config"}), "Python code of its own",
    ),
    "a weight less": (
        lambda path: next(path.glob("*.safetensors")).unlink(), "no model could be loaded from",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_cannot_be_converted_is_one_line_and_leaves_nothing(folder, tmp_path, fault, capsys):
    spoil, said = FAULTS[fault]
    shutil.copytree(folder, tmp_path / "dense")
    spoil(tmp_path / "dense")
    assert main(["convert", str(tmp_path / "dense"), str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert said in lines[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--layers", "7"], "layers: expected some of 0 to 1, got [7]"),
        (["--layers", "1-x"], "--layers: expected numbers and ranges such as 0 3 8-29, got '1-x'"),
        (["--layers", "1-0"], "--layers: expected numbers and ranges such as 0 3 8-29, got '1-0'"),
        (["--gate-bias", "nan"], "gate_bias: expected a finite number, got nan"),
        (["--tokens", "-1"], "--tokens: expected 0 or more, got -1"),
        (["--text", "/nowhere"], "no such text: /nowhere"),
        (["--nsa.window-size", "0"], "window_size"),
        (["--infllm-v2.kernel-size", "16"], "--infllm-v2.kernel-size 16: --method nsa has no such size"),
        (["--method", "infllm_v2", *FLAGS[-2:]], "--nsa.window-size 10: --method infllm_v2 has no such size"),
    ],
)
def test_a_wrong_option_is_one_line(folder, tmp_path, flags, said, capsys):
    assert main(["convert", str(folder), str(tmp_path / "out"), *flags]) == 2
    assert said in capsys.readouterr().err


def test_what_is_there_stays_and_a_full_disk_is_found_out_before(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 2
    assert "is there and not empty; expected a new folder" in capsys.readouterr().err
    usage = namedtuple("usage", "total used free")(1, 1, 10_000)
    monkeypatch.setattr(source.shutil, "disk_usage", lambda path: usage)
    assert main(["convert", str(folder), str(tmp_path / "other")]) == 2
    assert "GB, the disk has 0.00 GB left" in capsys.readouterr().err


def test_a_converted_folder_is_not_converted_again(folder, tmp_path, capsys):
    assert main(["convert", str(folder), str(tmp_path / "out"), *FLAGS, "--tokens", "0"]) == 0
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "out"), str(tmp_path / "again")]) == 2
    assert "attention='nsa' already; expected a dense one" in capsys.readouterr().err


def test_numbers_of_layers():
    assert layer_numbers(()) is None
    assert layer_numbers(("3", "8-10", "0")) == [3, 8, 9, 10, 0]
