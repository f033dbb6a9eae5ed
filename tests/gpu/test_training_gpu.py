"""`nsa train` as a whole on a GPU: in CUDA graphs, with accumulation, evaluation, checkpoints and going on from one."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu

LAYOUTS = {
    "rows": ("--layout", "rows"),
    "packed, with checkpointing": ("--layout", "flat", "--gradient-checkpointing"),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for file in range(40):
        lines = (f"name_{file}_{line} = {line * file % 977}" for line in range(60 + 11 * file))
        (folder / f"{file}.txt").write_text("\n".join(lines))
    return folder


def train(text: Path, out: Path, *flags: str) -> list[float]:
    """The losses of every step."""
    command = [
        *(sys.executable, "-m", "nsa", "train", "--preset", "demo", "--data", str(text), "--out", str(out)),
        *("--curriculum", "128x8", "256x6:repeated=0.2", "--batch-tokens", "1024", "--accumulation", "2"),
        *("--dtype", "bfloat16", "--log-every", "1", "--eval-every", "5", "--save-every", "7", "--quiet", *flags),
    ]
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def check_equal_to_rounding(found: list[float], expected: list[float]) -> None:
    """Sums into embeddings have no fixed order, and products may use other algorithms at other addresses."""
    rounding = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=rounding, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cuda_graphs_change_no_loss(layout: str, text: Path, tmp_path: Path) -> None:
    """Also where gradients are added up over two passes, rows grow, and evaluation comes between."""
    with ThreadPoolExecutor() as runs:
        graphs = runs.submit(train, text, tmp_path / "graphs", *LAYOUTS[layout])
        none = runs.submit(train, text, tmp_path / "none", *LAYOUTS[layout], "--no-cuda-graphs")
        found, expected = graphs.result(), none.result()
    assert len(found) == 14
    check_equal_to_rounding(found, expected)
    assert found[-1] < found[0]


def test_a_run_in_cuda_graphs_goes_on_from_its_checkpoint(text: Path, tmp_path: Path) -> None:
    whole = train(text, tmp_path / "whole")
    (tmp_path / "whole" / "model.safetensors").unlink()  # as if it had been stopped after the first checkpoint
    shutil.rmtree(tmp_path / "whole" / "checkpoint-14")
    found = train(text, tmp_path / "whole", "--resume")
    check_equal_to_rounding(found, whole)
