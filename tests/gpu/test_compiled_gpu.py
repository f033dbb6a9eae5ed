"""Runs `compiled.py` in a process of its own, without the shape checks of the tests' conftest."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu


def test_torch_compile_and_opcheck_pass() -> None:
    # Warnings are the compiler's own there, so they are no errors.
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--noconftest",
        "-p",
        "no:cacheprovider",
        "-o",
        "filterwarnings=",
        "--show-capture=no",
    ]
    done = subprocess.run([*command, "compiled.py"], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
