"""Scores of blocks to the second order: what a query pays to a block, from the mean and the variance of its keys.

    log sum_i exp(s q . k_i)  ~  log l + s q . mean_i k_i + s^2 / 2  sum_c q_c^2 var_i k_ic

is the cumulant expansion of the log of a block's attention mass; eq. 8's score is its first term. With phi(block) for
the mean it is one product of wider vectors, s q' . k', so that whoever attends to compressed keys can take it:

    q' = [q, s/2 q^2]        k' = [phi(block), var(block)]

Source: COBS (arXiv:2607.09052). The variance is of each channel by itself, of keys at their own rotary positions.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def with_variance(k_cmp: Float[Tensor, "b c g d"], blocks: Float[Tensor, "b c g l d"]) -> Float[Tensor, "b c g two_d"]:
    """k' of compressed keys and the raw keys of their blocks, at their positions."""
    variance = (blocks - blocks.mean(-2, keepdim=True)).square().mean(-2)
    return torch.cat([k_cmp, variance], dim=-1)


def mean_and_variance(blocks: Float[Tensor, "b c g l d"]) -> Float[Tensor, "b c g two_d"]:
    """k' with phi = mean, of blocks of keys at their positions."""
    return with_variance(blocks.mean(-2), blocks)


def as_wide_as(k_cmp: Float[Tensor, "_ _ _ w"], q: Float[Tensor, "b t h d"], scale: float) -> Float[Tensor, "b t h w"]:
    """The queries that go with compressed keys: q, or q' where the keys carry their variance."""
    return q if k_cmp.shape[-1] == q.shape[-1] else torch.cat([q, (q * q) * (scale / 2)], dim=-1)


def folded(d_wide: Float[Tensor, "b t h w"], q: Float[Tensor, "b t h d"], scale: float) -> Float[Tensor, "b t h d"]:
    """The gradient of q, of that of `as_wide_as`."""
    d = q.shape[-1]
    return d_wide if d_wide.shape[-1] == d else d_wide[..., :d] + d_wide[..., d:] * q * scale
