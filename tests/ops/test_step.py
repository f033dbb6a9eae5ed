"""What stands between the products of a decoding step, against its formulas."""

import pytest
import torch

from nsa.ops.step import add_norm, swiglu


def test_the_sum_and_its_norm() -> None:
    residual, x, weight = (torch.randn(*shape, dtype=torch.float64) for shape in ((3, 8), (3, 8), (8,)))
    total, z = add_norm(residual, x, weight, 1e-2)
    torch.testing.assert_close(total, residual + x)
    for row in range(3):
        length = (sum(float(y) ** 2 for y in total[row]) / 8 + 1e-2) ** 0.5
        torch.testing.assert_close(z[row], total[row] / length * weight, rtol=1e-12, atol=1e-12)
    same, z = add_norm(total, None, weight, 1e-2)
    assert same is total
    torch.testing.assert_close(z, add_norm(residual, x, weight, 1e-2)[1])


def test_the_sum_is_rounded_before_its_norm() -> None:
    residual, x, weight = (torch.randn(3, 8).bfloat16(), torch.randn(3, 8).bfloat16(), torch.ones(8).bfloat16())
    total, z = add_norm(residual, x, weight, 1e-6)
    assert torch.equal(total, residual + x)
    assert torch.equal(z, add_norm(total, None, weight, 1e-6)[1])


def test_one_half_gates_the_other() -> None:
    both = torch.randn(3, 10, dtype=torch.float64)
    gate, up = both[:, :5], both[:, 5:]
    torch.testing.assert_close(swiglu(both), gate / (1 + (-gate).exp()) * up, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("without_shape_checks")
def test_shapes_that_do_not_fit_are_one_line() -> None:
    with pytest.raises(ValueError, match="add_norm: weight should have shape"):
        add_norm(torch.zeros(2, 8), None, torch.zeros(7), 0.0)
    with pytest.raises(ValueError, match="add_norm: x should have shape"):
        add_norm(torch.zeros(2, 8), torch.zeros(3, 8), torch.zeros(8), 0.0)
    with pytest.raises(ValueError, match=r"swiglu: gate_and_up should have shape \[rows, 2 width\], got \[2, 7\]"):
        swiglu(torch.zeros(2, 7))
