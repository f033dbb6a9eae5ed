"""`nsa adapt --compile` on a CPU, in a process of its own: torch.compile cannot trace the shape checks of the tests."""

import json
import shutil
import subprocess
import sys

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from nsa.cli import main
from nsa.training.tokenizer import byte_tokenizer


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_layers_learn_as_the_others_do(tmp_path):
    """Losses of the second stage's steps, and of the model that comes of them."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=259, max_position_embeddings=32, **sizes)).save_pretrained(
        tmp_path / "dense"
    )
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "code.txt").write_text("".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(100)))
    flags = ["--nsa.compress-block-size", "8", "--nsa.compress-stride", "8", "--nsa.select-block-size", "8",
             "--nsa.num-selected-blocks", "3", "--nsa.window-size", "8", "--tokens", "0"]  # fmt: skip
    assert main(["convert", str(tmp_path / "dense"), str(tmp_path / "sparse"), *flags]) == 0
    command = ["adapt", str(tmp_path / "sparse"), "--first", "--second", "32x3", "--no-twin", "--data",
               str(tmp_path / "code.txt"), "--cache-dir", str(tmp_path / "cache"), "--batch-tokens", "64",
               "--eval-tokens", "64", "--device", "cpu", "--log-every", "1", "--second-rate", "0.01"]  # fmt: skip
    assert main([*command, "--quiet", "--no-compile", "--out", str(tmp_path / "plain")]) == 0
    options = ["--quiet", "--compile", "--out", str(tmp_path / "compiled")]
    done = subprocess.run(
        [sys.executable, "-m", "nsa", *command, *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    plain, compiled = (losses(tmp_path / name) for name in ("plain", "compiled"))
    assert compiled == pytest.approx(plain, abs=1e-3)
    assert len(set(plain)) == len(plain)


def losses(out):
    lines = [json.loads(line) for line in (out / "stage-2" / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line] + json.loads((out / "adapt.json").read_text())["loss"][
        "stage-2"
    ]
