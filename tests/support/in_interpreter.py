"""Files of tests in Triton's interpreter, in processes of their own: it reads its flag when a kernel is decorated.

Without the conftest: its shape checks wrap functions in a way that torch.compile cannot trace.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

KERNELS = Path(__file__).parents[1] / "kernels"


def check_file(name: str, cases: Callable[[int], range]) -> None:
    """All tests of tests/kernels/NAME pass; `cases` is the fixture."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CASES": str(len(cases(0)))}
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", name]
    done = subprocess.run(command, cwd=KERNELS, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
