"""Two ranks on a CPU, over gloo, in processes of their own: heads and caches are spread, tokens are the same."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from vllm_models import engine, environment, expected, prompts, save

GIVEN = prompts(5, 40, 300, seed=7)
NEW = 12
PROGRAM = """
import json, sys
if __name__ == "__main__":
    sys.path.insert(0, {here!r})
    from vllm_models import engine, greedy, written
    llm = engine({folder!r}, tensor_parallel_size=2, distributed_executor_backend="mp", max_num_batched_tokens=256)
    json.dump(written(greedy(llm, {given}, {new})), open({out!r}, "w"))
"""


def test_two_ranks_write_what_generate_writes(folders, tmp_path):
    program, out = tmp_path / "ranks.py", tmp_path / "out.json"
    here, folder = str(Path(__file__).parent), str(folders["nsa"])
    program.write_text(PROGRAM.format(here=here, folder=folder, given=GIVEN, new=NEW, out=str(out)))
    # Ranks may share a core; the engine stays in the program.
    given = {**environment(), "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, env=given, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert json.loads(out.read_text()) == expected(folders["nsa"], GIVEN, NEW)


def test_ranks_that_do_not_divide_the_heads_are_one_line(tmp_path):
    folder = save(tmp_path / "model", "nsa", num_attention_heads=4, num_key_value_heads=1)
    with pytest.raises(ValueError, match="tensor_parallel_size: expected a divisor of num_key_value_heads=1, got 2"):
        engine(folder, tensor_parallel_size=2)
