"""Bad files and flags for every command: it works, or says why not in one line; never a traceback.

pytest tests/fuzz/test_cli_fuzz.py --cases 5000
"""

import io
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_cases import Case, lines_of, make, write_files

from nsa.cli import COMMANDS, main
from nsa.eval import demo, fetch

CASES = 250


@pytest.fixture
def templates(tmp_path: Path) -> Path:
    folder = tmp_path / "templates"
    folder.mkdir()
    write_files(folder)
    return folder


@pytest.fixture(autouse=True)
def _nothing_is_trained_for_minutes_or_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*arguments: object) -> None:
        raise ValueError("not in this test")

    monkeypatch.setattr(demo, "train_and_judge", refuse)
    monkeypatch.setattr(fetch, "download", refuse)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # nothing is written outside of the test's folder


def call(case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str | None:
    """What is wrong with how the command ended, if anything is."""
    capsys.readouterr()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(case.stdin), encoding="utf-8"))
    try:
        code = main(case.arguments)
    except SystemExit as stop:  # --help
        code = stop.code or 0
    said = capsys.readouterr().err
    if code == 0 and "Traceback" not in said:
        return None
    name = f"nsa {case.arguments[0]}:"
    # What was left out of a folder of texts is said before, and which stage begins.
    remarks = r"[^\n]+ (left out, [^\n]+|is all there is; [^\n]+)"
    before = rf"nsa train: {remarks}|{name} {remarks}|{name} (stage-\d|dense-trained): [^\n]+"
    if code == 2 and re.fullmatch(rf"(({before})\n)*{name} error: [^\n]+\n", said.lstrip()):
        return None
    return f"exit code {code}, and on stderr:\n{said}"


def test_no_command_is_left_out(tmp_path: Path) -> None:
    assert set(lines_of(tmp_path)) == set(COMMANDS) - {"corpus", "serve"}  # one downloads, one does not end


@pytest.mark.filterwarnings("default")
def test_every_command_works_or_says_why_not_in_one_line(
    templates: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    cases: Callable[[int], range],
) -> None:
    wrong = []
    for number in cases(CASES):
        case = make(number, templates, tmp_path / "case")
        found = call(case, monkeypatch, capsys)
        if found is not None:
            wrong.append(f"case {number}: {case}\n{found}")
    assert not wrong, f"{len(wrong)} cases\n\n" + "\n\n".join(wrong[:20])
