"""Runs traced.py in a process of its own, without the conftest, whose shape checks torch.compile cannot trace."""

import subprocess
import sys
from pathlib import Path


def test_the_layer_passes_its_checks_under_the_tracers() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--noconftest",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore",
        "traced.py",
    ]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
