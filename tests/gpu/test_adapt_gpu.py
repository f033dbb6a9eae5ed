"""`nsa adapt --compile` in a process of its own: torch.compile cannot trace the shape checks of the tests' conftest.

Where there is no GPU: python -m pytest --noconftest tests/gpu/test_adapt_gpu.py, which compiles for the CPU, a minute.
"""

import json
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
OPTIONS = ["--first", "--second", "64x4", "--no-twin", "--batch-tokens", "128", "--eval-tokens", "128",
           "--warmup-steps", "1", "--second-rate", "0.01", "--log-every", "1", "--quiet",
           "--device", DEVICE]  # fmt: skip


def test_compiled_layers_learn_as_the_others_do(tmp_path: Path) -> None:
    """The losses of stage 2's steps, and those of the model that comes of them."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 1, "num_hidden_layers": 1}
    dense = LlamaForCausalLM(LlamaConfig(vocab_size=259, max_position_embeddings=64, **sizes))
    dense.save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "code.txt").write_text("".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(200)))
    assert main(["convert", str(tmp_path / "dense"), str(tmp_path / "sparse"), *SIZES]) == 0
    command = ["adapt", str(tmp_path / "sparse"), "--data", str(tmp_path / "code.txt"), "--cache-dir",
               str(tmp_path / "cache"), *OPTIONS]  # fmt: skip
    assert main([*command, "--no-compile", "--out", str(tmp_path / "plain")]) == 0
    compiled = [sys.executable, "-m", "nsa", *command, "--compile", "--out", str(tmp_path / "compiled")]
    done = subprocess.run(compiled, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = _losses(tmp_path / "plain")
    assert _losses(tmp_path / "compiled") == pytest.approx(expected, rel=1e-3)
    assert expected[3] < expected[0] * 0.99  # what was learnt is ten times what may differ


def _losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "stage-2" / "metrics.jsonl").read_text().splitlines()]
    steps = [line["loss"] for line in lines if "loss" in line]
    assert len(steps) == 4
    return steps + json.loads((out / "adapt.json").read_text())["loss"]["stage-2"]
