"""The function, the layer and InfLLM-V2 on the kernels, in Triton's interpreter."""

from collections.abc import Callable

import pytest
from in_interpreter import check_file


@pytest.mark.parametrize("file", ["interpreted_function.py", "interpreted_infllm_v2.py"])
def test_the_kernels_pass_their_checks_in_the_interpreter(file: str, cases: Callable[[int], range]) -> None:
    check_file(file, cases)
