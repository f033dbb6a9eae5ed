"""Runs each of these files in a process of its own: Triton reads the interpreter's flag when a kernel is decorated.

Without the conftest: its shape checks wrap functions in a way that torch.compile cannot trace.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

FILES = (
    "interpreted.py", "interpreted_decoding.py", "interpreted_step.py", "interpreted_fuzz.py",
    "interpreted_not_finite.py", "interpreted_infllm_v2.py",
)  # fmt: skip


@pytest.mark.parametrize("file", FILES)
def test_the_kernels_pass_their_checks_in_the_interpreter(file: str, cases: Callable[[int], range]) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CASES": str(len(cases(0)))}
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", file]
    done = subprocess.run(command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
