"""The command: help without waiting for torch, one line and exit code 2 for a user's error."""

import re
import subprocess
import sys

import pytest

from nsa.cli import COMMANDS, main, parse
from nsa.training.config import TrainConfig
from nsa.training.presets import preset


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_loads_neither_torch_nor_transformers(command):
    code = (
        "import sys\nfrom nsa.cli import main\n"
        f"try: main([{command!r}, '--help'])\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'heavy'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"usage: nsa {command}" in done.stdout


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


def test_ctrl_c_is_one_line_and_130(monkeypatch, capsys):
    def interrupted(self):
        raise KeyboardInterrupt("stopped at step 3")

    monkeypatch.setattr(TrainConfig, "run", interrupted)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "\nnsa train: stopped at step 3\n"
