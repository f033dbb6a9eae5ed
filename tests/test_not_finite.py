"""A number that is not finite reaches the queries that see it and no other, in output and gradients.

The truth is the brute force, which reads nothing but what a query sees.
"""

import pytest
import torch
from layouts import Layout
from test_functional import SMALL, brute_force, inputs
from torch import Tensor

from nsa.functional import native_sparse_attention
from nsa.ops.selected_attention import selected_attention

LAYOUTS = {
    "one token": Layout(t=1, s=1),
    "causal, shorter than a block": Layout(b=2, t=3, s=3),
    "causal, 15 tokens": Layout(t=15, s=15),  # PyTorch's own kernel hides NaN there
    "causal, 24 tokens": Layout(t=24, s=24),
    "whole": Layout(b=2, t=45, s=45),
    "suffix": Layout(t=7, s=45),
    "packed": Layout(t=38, s=38, cu_seqlens_q=(0, 20, 23, 23, 38)),
    "ragged": Layout(b=3, t=5, s=25, seqlens_k=(25, 3, 18)),
}
WHERE = {"the first token": 0, "in the middle": 1, "the last token": -1}


def spoiled(layout: Layout, name: str, where: str, value: float, **sizes: int) -> list[Tensor]:
    """q, k, v, gates with one number of a token, of row 0 and the last head, replaced."""
    tensors = inputs(layout, d=4, e=4, **sizes)
    x = tensors["qkv".index(name)]
    length = x.shape[1] if layout.seqlens_k is None or name == "q" else layout.seqlens_k[0]
    at = {0: 0, 1: length // 2, -1: length - 1}[WHERE[where]]
    x[0, at, -1, 1] = value
    return tensors


def assert_alike(actual: Tensor, truth: Tensor, name: str) -> None:
    finite = truth.isfinite()
    assert torch.equal(actual.isfinite(), finite), f"{name}: finite elsewhere than the truth"
    torch.testing.assert_close(actual[finite], truth[finite], rtol=0.0, atol=1e-10, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_queries_that_see_it_are_not_finite(layout: str, name: str, where: str, value: float) -> None:
    tensors = spoiled(LAYOUTS[layout], name, where, value)
    actual = native_sparse_attention(*tensors, SMALL, **LAYOUTS[layout].lengths())
    assert_alike(actual, brute_force(LAYOUTS[layout], SMALL, *tensors), "out")


@pytest.mark.parametrize("name", ["q", "k", "v", "d_out"])
@pytest.mark.parametrize("layout", ["causal, 15 tokens", "packed", "ragged", "suffix"])
def test_only_gradients_that_it_has_a_part_in_are_not_finite(layout: str, name: str) -> None:
    layout = LAYOUTS[layout]
    tensors = spoiled(layout, "q" if name == "d_out" else name, "in the middle", 1.0 if name == "d_out" else torch.nan)
    found = []
    for function in (
        lambda *x: native_sparse_attention(*x, SMALL, **layout.lengths()),
        lambda *x: brute_force(layout, SMALL, *x),
    ):
        leaves = [x.clone().requires_grad_() for x in tensors]
        out = function(*leaves)
        d_out = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        d_out = d_out.masked_fill(~out.isfinite(), 0.0)  # a loss that leaves those queries out
        if name == "d_out":
            d_out[0, 3, -1, 0] = torch.nan
        found.append(torch.autograd.grad(out, leaves, d_out))
    for grad, actual, truth in zip(("dq", "dk", "dv", "dgates"), *found, strict=True):
        assert_alike(actual, truth, grad)


@pytest.mark.parametrize("layout", ["causal, shorter than a block", "whole", "packed", "ragged"])
def test_what_one_sequence_holds_changes_no_bit_of_another(layout: str) -> None:
    layout = LAYOUTS[layout]
    clean, tensors = (spoiled(layout, "k", "in the middle", value) for value in (1.0, torch.nan))
    before, after = (native_sparse_attention(*x, SMALL, **layout.lengths()) for x in (clean, tensors))
    first, *others = layout.members(SMALL)
    assert not torch.equal(first.queries(before), first.queries(after))
    for other in others:
        assert torch.equal(other.queries(before), other.queries(after))


@pytest.mark.parametrize("tiling", ["by_query", "by_block", "masked"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_no_tiling_spreads_it(tiling: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = LAYOUTS["whole"]
    monkeypatch.setattr("nsa.ops.selected_attention._cheapest", lambda *_: tiling)
    tensors = spoiled(layout, "v", "in the middle", value)
    actual = native_sparse_attention(*tensors, SMALL)
    assert_alike(actual, brute_force(layout, SMALL, *tensors), "out")


def test_scores_of_minus_infinity_alone_have_no_softmax() -> None:
    """As 0 / 0: not the 0 of a query that sees nothing, in whichever tile."""
    q, k, v, _ = inputs(LAYOUTS["whole"], h=2, g=1, d=4, e=4)
    q = torch.ones_like(q)
    indices = torch.zeros(2, 45, 1, 1, dtype=torch.int32)
    k[:, :8] = -torch.inf
    for tiling in ("by_query", "by_block", "masked"):
        out, lse = selected_attention(q, k, v, indices, SMALL, tiling=tiling)
        assert out.isnan().all()
        assert lse.isnan().all()
