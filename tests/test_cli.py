"""The command: help without waiting for torch, one line and exit code 2 for a user's error."""

import importlib
import importlib.metadata
import inspect
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from safetensors import SafetensorError

import nsa.commands.train
from nsa.bench.result import Result
from nsa.cli import COMMANDS, main, parse
from nsa.training.config import TrainConfig
from nsa.training.presets import preset


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in COMMANDS)


def test_no_help_waits_for_torch_transformers_or_numpy():
    """`nsa COMMAND --help` needs the command's arguments only; the heavy imports wait inside its run()."""
    code = """
import sys
from nsa.cli import COMMANDS, main
for command in ("", *COMMANDS):
    try:
        main([command, "--help"] if command else ["--help"])
    except SystemExit as stop:
        assert not stop.code
    heavy = {"torch", "transformers", "numpy"} & set(sys.modules)
    assert not heavy, (command, heavy)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [f"usage: nsa {command} " in done.stdout for command in COMMANDS] == [True] * len(COMMANDS)


@pytest.mark.parametrize("command", ["train", "generate"])
def test_help_shows_examples(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert f"nsa {command} " in capsys.readouterr().out.split("Examples:")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dance"], "unknown command 'dance'; expected one of train"),
        (["train", "--preset", "huge"], "unknown preset 'huge'; expected one of demo, small, 1b"),
        (["train", "--no-such-flag"], "error: Unrecognized options: --no-such-flag"),
        (["bench", "show", "/nowhere.json"], "error: no such file: /nowhere.json (expected what `nsa bench"),
        (["train", "--hidden-size", "wide"], "invalid literal for int"),
        (["train", "--data", "/nowhere", "--out", "/tmp/nsa-unused"], "no such file or folder"),
        (["train", "--nsa.window-size", "0"], "window_size"),
        (["generate", "/nowhere", "--prompt", "x"], "/nowhere holds no model"),
        (["generate", "/nowhere", "--prompt", "x", "--top-p", "0"], r"top_p in (0, 1]"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(arguments, message, capsys):
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert re.fullmatch(r"nsa[ a-z]*: error: [^\n]+\n", said)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_an_option_is_its_own_and_no_heading_of_a_section(command, capsys):
    """Comments that stand above several fields are no help on the first of them, or on all."""
    with pytest.raises(SystemExit):
        main([command, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    source = Path(inspect.getfile(type_of(command))).read_text(encoding="utf-8")
    for heading in re.findall(r"^    # ([^\n]+)$", source, re.MULTILINE):
        assert f" {heading} (default" not in said


def type_of(command: str) -> type:
    return importlib.import_module(f"nsa.commands.{command}").Arguments


def test_flags_change_single_values_of_the_preset():
    config = parse("train", ["--preset", "small", "--hidden-size", "64", "--nsa.window-size", "32"])
    small = preset("small")
    assert isinstance(config, TrainConfig)
    assert (config.hidden_size, config.nsa.window_size) == (64, 32)
    assert config.nsa.select_block_size == small.nsa.select_block_size
    assert (config.learning_rate, config.curriculum) == (small.learning_rate, small.curriculum)
    assert parse("train", []) == preset("demo")


def test_traceback_shows_where_an_error_was_raised():
    with pytest.raises(ValueError, match="holds no model"):
        main(["generate", "/nowhere", "--prompt", "x", "--traceback"])


@pytest.mark.parametrize(
    ("stopped", "said"),
    [(KeyboardInterrupt("stopped at step 3"), "interrupted; stopped at step 3"), (KeyboardInterrupt(), "interrupted")],
)
def test_ctrl_c_is_one_line_and_130(stopped, said, monkeypatch, capsys):
    running(monkeypatch, stopped)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == f"\nnsa train: {said}\n"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "'utf-8' codec can't decode byte 0xff"),
        (json.JSONDecodeError("Expecting value", "x", 0), "Expecting value"),
        (PermissionError(13, "Permission denied", "/there"), "[Errno 13] Permission denied: '/there'"),
        (SafetensorError("Error while deserializing header"), "Error while deserializing header"),
        (EOFError("No data left in file"), "No data left in file"),
        (StrictDataclassFieldValidationError("bos_token_id", TypeError("of another type")), "for field 'bos_token_id'"),
        (zipfile.BadZipFile("File is not a zip file"), "File is not a zip file"),
        (Exception("data did not match any variant\nof untagged enum"), "any variant of untagged enum"),  # tokenizers'
        (RecursionError("maximum recursion depth exceeded while decoding a JSON array"), "decoding a JSON array"),
        (MemoryError(), "out of memory: MemoryError"),
        (torch.OutOfMemoryError("CUDA out of memory."), "out of memory: CUDA out of memory."),
        (
            torch.AcceleratorError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in"),
            "out of memory: CUDA error: out of memory\n",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory: DefaultCPUAllocator"),
        (
            ModuleNotFoundError("No module named 'gguf'", name="gguf"),
            "which is not installed: pip install 'gguf>=0.17'",
        ),
        (ImportError("peft is required: pip install peft"), "peft is required: pip install peft"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_files_memory_and_packages_cause_is_one_line_and_2(error, said, monkeypatch, capsys):
    running(monkeypatch, error)
    assert main(["train"]) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert re.fullmatch(r"nsa train: error: [^\n]+\n", printed)


@pytest.mark.parametrize(
    "error", [KeyError("x"), TypeError("x"), RuntimeError("x"), RecursionError("x"), ModuleNotFoundError(name="nsa.x")]
)
def test_a_fault_of_its_own_shows_where_it_was_raised_and_says_so(error, monkeypatch, capsys):
    running(monkeypatch, error)
    assert main(["train"]) == 1
    *lines, last = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert last == "nsa train: this is a fault of nsa; please report it with the lines above"


def test_without_a_package_every_command_says_what_to_install():
    """In one line, with what the same extra lacks besides, and with no index that would have to hold nsa."""
    code = """
import sys
for name in ("tyro", "rich", "accelerate"):
    sys.modules[name] = None
from nsa.cli import COMMANDS, main
assert [main([name]) for name in COMMANDS] == [2] * len(COMMANDS)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = "this needs the package tyro, which is not installed: pip install 'accelerate>=1.10' 'rich>=14' 'tyro>=1.0'"
    assert done.stderr.splitlines() == [f"nsa {command}: error: {said}" for command in COMMANDS]


@pytest.mark.parametrize("arguments", ["--help", "fetch --help", "bench show shown.json"])
def test_a_closed_pipe_is_no_traceback(arguments, tmp_path):
    (tmp_path / "shown.json").write_text(Result(bench="step", facts={}, shape={}, matrix_rate=1.0).to_json())
    command = f"{sys.executable} -m nsa {arguments} | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("141\n", "")


def test_a_locale_without_a_character_shows_its_code():
    code = r"import sys; from nsa.cli import main; main([]); print('1 \xb1 2 \udcff')"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.splitlines()[-1] == r"1 \xb1 2 \udcff", done.stderr


def test_the_version_has_one_place(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"nsa {nsa.__version__}\n"
    assert importlib.metadata.version("nsa") == nsa.__version__
    done = subprocess.run([sys.executable, "-m", "nsa", "--version"], capture_output=True, text=True, check=False)
    assert done.stdout == f"nsa {nsa.__version__}\n", done.stderr


def running(monkeypatch, error: BaseException) -> None:
    """`nsa train` meets this error."""

    def run(arguments):
        raise error

    monkeypatch.setattr(nsa.commands.train, "run", run)


def test_paths_with_a_tilde_are_expanded_and_unknown_users_are_names(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse("train", ["--out=~/runs", "--cache-dir=~no-such-user/x"]).out == tmp_path / "runs"
    assert parse("train", ["--cache-dir=~no-such-user/x"]).cache_dir == Path("~no-such-user/x")
    assert parse("bench", ["train", "--output=~/stem"]).what.output == tmp_path / "stem"
