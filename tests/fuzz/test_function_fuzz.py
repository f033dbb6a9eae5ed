"""Random calls of the function on the PyTorch operations: `pytest tests/fuzz --cases 5000` for a long run."""

from collections.abc import Callable

from function_cases import check, make_case


def test_random_calls_equal_the_brute_force(cases: Callable[[int], range]) -> None:
    for seed in cases(80):
        check(make_case(seed), "torch", gradients=False)


def test_gradients_of_random_calls_equal_those_of_the_brute_force(cases: Callable[[int], range]) -> None:
    for seed in cases(30):
        check(make_case(1_000_000 + seed, largest=20, rows=24), "torch", gradients=True)
