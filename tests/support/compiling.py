"""Kernels compiled ahead of time, in a process of their own (tests/kernels/compile_all.py), and what they may take."""

import json
import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "kernels"
SHARED = {"80": 166912, "89": 101376, "90": 232448, "100": 232448}
# On Hopper, for the paper's heads, these take the place of those.
HOPPER = {"selected_forward_hopper_kernel", "compressed_forward_hopper_kernel", "scoring_hopper_kernel"}

# Spills inside the loop, and yet was measured faster on an H200 than the smaller tile that does not.
# With parts of dq: 88 bytes on Hopper where queries go in pieces, as here; 48 where they do not.
STACK = {"selected_dkdv_kernel": 256, "selected_dkdv_kernel with parts": 320}


def compiled(architecture: str, dtype: str, h: int, g: int, d: int, e: int, *options: str) -> dict[str, dict]:
    command = [sys.executable, "compile_all.py", architecture, dtype, *map(str, (h, g, d, e)), *options]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=FOLDER, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return {found["kernel"]: found for found in map(json.loads, done.stdout.splitlines())}
