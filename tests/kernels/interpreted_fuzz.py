"""Random calls of the function on the kernels, in Triton's interpreter; `test_interpreter.py` runs this file.

As many as the environment's CASES, a few by default.
"""

import os

import pytest
import torch
from fast_interpreter import few_programs
from function_cases import check, make_case
from poison import poisoned_memory

torch.set_num_threads(1)
CASES = int(os.environ.get("CASES", "0"))


# numpy, of a gate of 0 and of scores that are hidden after exp2.
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value", "ignore:overflow")
@pytest.mark.parametrize("gradients", [False, True], ids=["output", "gradients"])
def test_random_calls_equal_the_brute_force(gradients: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned_memory(monkeypatch)
    few_programs(monkeypatch)
    dtypes = [torch.float32, torch.float16]
    for seed in range(CASES or 5):
        case = make_case(seed, largest=12, rows=12, multiple=8, dtypes=dtypes)
        check(case, "triton", gradients=gradients)
