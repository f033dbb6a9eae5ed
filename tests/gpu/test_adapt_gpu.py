"""`nsa adapt --compile` in a process of its own: torch.compile cannot trace the shape checks of the tests' conftest.

Where there is no GPU: python -m pytest --noconftest tests/gpu/test_adapt_gpu.py, which compiles for the CPU, a minute.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nsa.cli import main
from nsa.training.tokenizer import byte_tokenizer

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = ["--nsa.compress-block-size", "16", "--nsa.compress-stride", "16", "--nsa.select-block-size", "16",
         "--nsa.num-selected-blocks", "3", "--nsa.window-size", "16", "--tokens", "0"]  # fmt: skip
OPTIONS = ["--first", "--no-twin", "--batch-tokens", "128", "--eval-tokens", "128", "--warmup-steps", "1",
           "--second-rate", "0.01", "--log-every", "1", "--quiet", "--device", DEVICE]  # fmt: skip


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """nsa adapt of a converted model of one layer, but for its stage 2."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 1, "num_hidden_layers": 1}
    dense = LlamaForCausalLM(LlamaConfig(vocab_size=259, max_position_embeddings=128, **sizes))
    dense.save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "code.txt").write_text("".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(200)))
    assert main(["convert", str(tmp_path / "dense"), str(tmp_path / "sparse"), *SIZES]) == 0
    data = ["--data", str(tmp_path / "code.txt"), "--cache-dir", str(tmp_path / "cache")]
    return ["adapt", str(tmp_path / "sparse"), *data, *OPTIONS]


def test_compiled_layers_learn_as_the_others_do(command: list[str], tmp_path: Path) -> None:
    """The losses of stage 2's steps, and those of the model that comes of them."""
    command += ["--second", "64x4"]
    assert main([*command, "--no-compile", "--out", str(tmp_path / "plain")]) == 0
    run_compiled([*command, "--out", str(tmp_path / "compiled")])
    expected = losses(tmp_path / "plain")
    assert len(expected) == 4 + 2
    assert losses(tmp_path / "compiled") == pytest.approx(expected, rel=1e-3)
    assert expected[3] < expected[0] * 0.99  # what was learnt is ten times what may differ


def test_a_compiled_stage_goes_on_from_its_checkpoint(command: list[str], tmp_path: Path) -> None:
    """Where the layers meet rows of the second length first, and were compiled for any length before."""
    out = tmp_path / "out"
    command += ["--second", "64x3", "128x5", "--teacher-weight", "0", "--save-every", "5", "--out", str(out)]
    run_compiled(command)
    expected = losses(out)
    assert len(expected) == 8 + 2
    (out / "stage-2" / "model.safetensors").unlink()  # as if it had been stopped after the first checkpoint
    shutil.rmtree(out / "stage-2" / "checkpoint-8")
    run_compiled([*command, "--resume"])
    assert losses(out) == pytest.approx(expected, rel=1e-3)
    assert expected[7] < expected[0] * 0.99


def run_compiled(command: list[str]) -> None:
    whole = [sys.executable, "-m", "nsa", *command, "--compile"]
    done = subprocess.run(whole, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def losses(out: Path) -> list[float]:
    """Of stage 2's steps; then of the model, on held-out rows and on their later halves."""
    lines = [json.loads(line) for line in (out / "stage-2" / "metrics.jsonl").read_text().splitlines()]
    steps = [line["loss"] for line in lines if "loss" in line]
    return steps + json.loads((out / "adapt.json").read_text())["loss"]["stage-2"]
