"""The kernels of decoding, in Triton's interpreter."""

from collections.abc import Callable

import pytest
from in_interpreter import check_file


@pytest.mark.parametrize("file", ["interpreted_decoding.py", "interpreted_step.py"])
def test_the_kernels_pass_their_checks_in_the_interpreter(file: str, cases: Callable[[int], range]) -> None:
    check_file(file, cases)
