"""Two ranks on a CPU, over gloo, in processes of their own: heads and caches are spread, tokens are the same."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from vllm_models import environment, expected, prompts, save

GIVEN = prompts(5, 40, 300, seed=7)
NEW = 12
HERE = Path(__file__).parent


def ranks(folder, out) -> subprocess.CompletedProcess:
    """Engine of two ranks, as a program: ranks are forked from one that has imported little."""
    program = f"""
import json, sys
sys.path.insert(0, {str(HERE)!r})
if __name__ == "__main__":
    from vllm_models import engine, greedy, written
    llm = engine({str(folder)!r}, tensor_parallel_size=2, distributed_executor_backend="mp", max_num_batched_tokens=256)
    json.dump(written(greedy(llm, {GIVEN}, {NEW})), open({str(out)!r}, "w"))
"""
    path = out.with_suffix(".py")
    path.write_text(program)
    unbound = {**environment(), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # ranks may share a core
    return subprocess.run([sys.executable, path], capture_output=True, text=True, env=unbound, check=False)


@pytest.mark.parametrize("attention", ["nsa", "infllm_v2"])
def test_two_ranks_write_what_generate_writes(attention, tmp_path):
    sizes = {"infllm_v2": {"dense_len": 64, "topk": 3, "window_size": 64}} if attention == "infllm_v2" else {}
    folder, out = save(tmp_path / "model", attention, **sizes), tmp_path / "out.json"
    done = ranks(folder, out)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert json.loads(out.read_text()) == expected(folder, GIVEN, NEW)


def test_ranks_that_do_not_divide_the_heads_are_one_line(tmp_path):
    done = ranks(save(tmp_path / "model", "nsa", num_attention_heads=3, num_key_value_heads=1), tmp_path / "out.json")
    said = "tensor_parallel_size: expected a divisor of num_key_value_heads=1, got 2"
    assert done.returncode != 0
    assert said in done.stdout + done.stderr
