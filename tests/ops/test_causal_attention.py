"""PyTorch's kernel for a whole past: as exact as the tiles, in 16 bits too."""

import pytest
import torch

from nsa.ops.causal_attention import causal_attention
from nsa.ops.window_attention import window_attention
from nsa.testing import assert_close_to_fp64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_in_16_bits_are_the_exact_ones_rounded(dtype, generator):
    """PyTorch's kernel by itself rounds within its sums: gradients of keys are off by six times their own rounding."""
    shapes = ((1, 512, 16, 16), (1, 512, 1, 16), (1, 512, 1, 16))
    inputs = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    d_out = torch.randn(shapes[0], generator=generator).to(dtype)
    results = []
    for attend, wanted in (
        (causal_attention, dtype),
        (lambda q, k, v: window_attention(q, k, v, 512)[0], torch.float64),
    ):
        leaves = [x.to(wanted).requires_grad_() for x in inputs]
        out = attend(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, d_out.to(wanted))])
    for name, actual, truth in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        assert_close_to_fp64(actual, truth.to(dtype), truth, name)
