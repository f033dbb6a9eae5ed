"""The gated sum (eq. 5)."""

import pytest
import torch

from nsa.ops.combine import combine
from nsa.testing import brute_force as paper


def test_equals_the_brute_force():
    outs = torch.randn(3, 2, 5, 4, 7, dtype=torch.float64)
    gates = torch.rand(2, 5, 4, 3, dtype=torch.float64)
    expected = torch.stack([paper.combine(*(out[row] for out in outs), gates[row]) for row in range(2)])
    torch.testing.assert_close(combine(*outs, gates), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("branch", range(3))
def test_a_one_hot_gate_isolates_its_branch(branch):
    outs = torch.randn(3, 2, 5, 4, 7)
    gates = torch.zeros(2, 5, 4, 3)
    gates[..., branch] = 1
    assert torch.equal(combine(*outs, gates), outs[branch])


def test_gradcheck():
    outs = torch.randn(3, 1, 2, 2, 3, dtype=torch.float64).requires_grad_()
    gates = torch.rand(1, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda outs, gates: combine(*outs, gates), (outs, gates))


def test_gates_in_float32_leave_the_dtype_of_the_branches():
    outs = torch.randn(3, 1, 2, 2, 3, dtype=torch.bfloat16)
    assert combine(*outs, torch.rand(1, 2, 2, 3)).dtype == torch.bfloat16


@pytest.mark.usefixtures("without_shape_checks")
def test_a_missing_gate_is_one_clear_line():
    outs = torch.randn(3, 1, 2, 4, 3)
    with pytest.raises(
        ValueError, match=r"^combine: gates should have shape \[b=1, t=2, h=4, 3\], got \[1, 2, 4, 2\]$"
    ):
        combine(*outs, torch.rand(1, 2, 4, 2))
