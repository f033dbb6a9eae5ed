"""The selector's own loss in training, on a few queries of every layer: `nsa.ops.block_divergence`.

The choice of blocks has no gradient. What trains the compressed keys to choose well is that their branch attends with
them; where the branch's gate is small, or compression serves its values better than the choice, little does.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nsa.config import NSAConfig
from nsa.modules.token_layout import TokenLayout
from nsa.ops.block_divergence import Queries, block_divergence
from nsa.ops.packed_blocks import first_blocks

QUERIES = 256  # of a batch, by default: runs of neighbours, one at a random place in each of as many equal parts
NEIGHBOURS = 16  # in a run
SCORES = 2**26  # at most, of all their heads with the keys that are read


def selector_loss(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b t g d"],
    k_cmp: Float[Tensor, "b c g d"],
    layout: TokenLayout,
    config: NSAConfig,
    queries: int = QUERIES,
) -> Float[Tensor, ""]:
    """`block_divergence` of at most so many random queries of whole sequences that lie as `layout` says."""
    b, t, h, _ = q.shape
    longest = t if layout.max_seqlen is None else min(t, layout.max_seqlen)
    run = min(NEIGHBOURS, queries, b * t)
    runs = max(1, min(queries // run, b * t // run, SCORES // (h * run * longest)))
    part = b * t / runs
    first = (torch.arange(runs, device=q.device) * part + torch.rand(runs, device=q.device) * (part - run)).long()
    index = first[:, None] + torch.arange(run, device=q.device)
    return block_divergence(q, k, k_cmp, config, _queries(index, t, k_cmp.shape[1], layout, config), longest)


def _queries(index: Int[Tensor, "m r"], t: int, c: int, layout: TokenLayout, config: NSAConfig) -> Queries:
    if layout.cu_seqlens is not None:
        cu = layout.cu_seqlens.long()
        sequence = torch.searchsorted(cu, index, right=True) - 1
        first = cu[sequence]
        return Queries(index, index - first, first, first_blocks(cu, config)[sequence])
    row = index // t
    position = index - row * t
    if layout.counts is not None:
        position = position - (t - layout.counts[row])
    return Queries(index, position, row * t, row * c)


class _WithLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        ctx.save_for_backward(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (loss,) = ctx.saved_tensors
        return grad, torch.full_like(loss, ctx.weight), None


def with_loss(x: Tensor, loss: Float[Tensor, ""], weight: float) -> Tensor:
    """x; whatever is differentiated through it, weight * loss is too, whatever the gradient of x is."""
    return _WithLoss.apply(x, loss, weight)
