"""Rotary positions (arXiv:2104.09864): the pairs (i, i + d/2) of a head turn by their position's angles."""

import torch
from jaxtyping import Float
from torch import Tensor


def rotated(x: Float[Tensor, "*at heads d"], cos: Float[Tensor, "*_ d"], sin: Float[Tensor, "*_ d"]) -> Tensor:
    """x turned as Llama does it, in x's dtype; cos and sin are alike for all heads.

    y[i] = x[i] cos[i] - x[i + d/2] sin[i],   y[i + d/2] = x[i + d/2] cos[i + d/2] + x[i] sin[i + d/2]
    """
    low, high = x.chunk(2, dim=-1)
    return (x * cos.unsqueeze(-2) + torch.cat([-high, low], dim=-1) * sin.unsqueeze(-2)).to(x.dtype)
