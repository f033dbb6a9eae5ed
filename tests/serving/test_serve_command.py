"""What `nsa serve` refuses before anything is loaded, each in one line; what it hands to vLLM."""

import json
import socket
import sys

import pytest

from nsa.cli import main, parse
from nsa.serving import checks
from nsa.serving.serve import PLAIN_CHAT, SERVER, vllm_command
from nsa.serving.vllm_plugin import why_not


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "model")


def write(folder, **config):
    folder.mkdir()
    config = {"model_type": "nsa_llama", "max_position_embeddings": 4096, "nsa": {"select_block_size": 64}, **config}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def said(capsys, *arguments) -> str:
    assert main(["serve", *map(str, arguments)]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    return line.removeprefix("nsa serve: error: ").rstrip()


def test_a_folder_without_a_model(capsys, tmp_path):
    assert said(capsys, tmp_path) == f"{tmp_path} holds no model: expected a folder with config.json"


def test_a_model_of_another_kind(capsys, tmp_path):
    folder = write(tmp_path / "gpt2", model_type="gpt2")
    expected = "expected a model of type nsa_llama, nsa_mistral, nsa_qwen2, nsa_qwen3, got"
    assert said(capsys, folder).endswith(f"{expected} 'gpt2'; vLLM serves others by itself")
    folder = write(tmp_path / "phi", model_type="nsa_phi3")
    assert said(capsys, folder).endswith(f"{expected} 'nsa_phi3'; vLLM has no decoder for it here")


def test_a_model_without_a_tokenizer(capsys, folder):
    (folder / "tokenizer.json").unlink()
    assert said(capsys, folder).endswith("has no tokenizer: expected tokenizer.json beside config.json")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--block-size", "96"], "block size: expected a multiple of select_block_size=64 (l'), got 96"),
        (["--max-model-len", "5000"], "max_model_len: expected 1 to the model's context of 4096 tokens, got 5000"),
        (["--max-num-seqs", "0"], "max_num_seqs: expected at least 1, got 0"),
        (["--memory", "-1"], "memory: expected more than 0 GiB, got -1.0"),
        (["--port", "70000"], "port: expected 1 to 65535, got 70000"),
    ],
)  # fmt: skip
def test_a_size_that_cannot_be(capsys, folder, options, expected):
    assert said(capsys, folder, *options) == expected


def test_a_port_in_use(capsys, folder):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        expected = f"cannot listen at 127.0.0.1:{port}: Address already in use; expected a free port"
        assert said(capsys, folder, "--port", port) == expected


def test_another_vllm_is_refused_and_none_falls_back(capsys, folder, monkeypatch):
    monkeypatch.setattr(checks, "vllm_version", lambda: "0.33.1")
    assert said(capsys, folder).startswith("nsa serves on vLLM 0.32, found 0.33.1; expected pip install 'vllm==0.32.*'")
    assert checks.choose_engine("transformers") == "transformers"
    monkeypatch.setattr(checks, "vllm_version", lambda: None)
    assert checks.choose_engine("auto") == "transformers"
    assert said(capsys, folder, "--engine", "vllm").startswith("engine='vllm': vLLM is not installed here; expected")
    assert said(capsys, folder, "--api-key", "x").startswith("api_key: transformers' server asks for none; expected")
    assert said(capsys, folder, "--name", "x").startswith(
        "name: transformers' server calls a model by its path; expected"
    )
    for options, name in ((["--memory", "2"], "memory"), (["--vllm=--seed 1"], "vllm"), (["--compile"], "compile")):
        assert said(capsys, folder, *options).startswith(f"{name}: transformers' server has no such option; expected")


def test_an_attention_without_caches_on_vllm(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "vllm_version", lambda: "0.32.0")
    told = said(capsys, write(tmp_path / "model", attention="other"), "--port", free_port())
    served = "('nsa', 'infllm_v2', 'dense', 'window')"
    assert told.startswith(f"serving on vLLM: expected attention of {served}, got 'other'")


def test_one_minor_version_serves():
    assert why_not("0.32.0") is None
    assert why_not("0.32.4+cpu") is None
    assert why_not("0.320.0") is not None


def test_a_torchvision_of_another_torch_is_one_line(capsys, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "vllm_version", lambda: "0.32.0")
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist\\nmore')")
    monkeypatch.syspath_prepend(tmp_path)
    told = said(capsys, folder, "--port", free_port())
    assert told.startswith("torchvision does not load beside this torch (operator torchvision::nms does not exist)")
    assert told.endswith("or none, which is enough: pip uninstall -y torchvision torchaudio torchcodec")


def test_graphs_are_of_a_gpu(capsys, folder, monkeypatch):
    monkeypatch.setattr(checks, "vllm_version", lambda: "0.32.0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    told = said(capsys, folder, "--graphs", "--port", free_port())
    assert told == "graphs: CUDA graphs need a GPU; expected graphs=False where there is none"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    words, _ = vllm_command(parse("serve", [str(folder), "--graphs"]), "name")
    assert json.loads(words[words.index("--compilation-config") + 1])["cudagraph_mode"] == "FULL_DECODE_ONLY"
    assert "--enforce-eager" not in words


def test_what_vllm_is_given(folder):
    arguments = parse("serve", [str(folder), "--port", "81", "--memory", "0.5", "--vllm=--seed 1 --x 'a b'"])
    words, environment = vllm_command(arguments, "name")
    assert words[1:5] == ["-c", SERVER, "--model", str(folder)]
    assert words[-5:] == [PLAIN_CHAT, "--seed", "1", "--x", "a b"]
    for option, value in {"--host": "127.0.0.1", "--port": "81", "--kv-cache-memory-bytes": str(2**29)}.items():
        assert words[words.index(option) + 1] == value
    assert "--enforce-eager" in words
    assert not any("KEY" in name for name in environment)
    (folder / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    assert PLAIN_CHAT not in vllm_command(arguments, "name")[0]
