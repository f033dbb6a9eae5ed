"""Attention to the whole past: what the selected and the window branch are while nothing lies out of their reach."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nsa.shapes import bind


def causal_attention(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b t g d"],
    v: Float[Tensor, "b t g e"],
    *,
    scale: float | None = None,
) -> Float[Tensor, "b t h e"]:
    """o_t = Attn(q_t, K, V) over the positions p <= t, by PyTorch's own kernel.

    Args:
        q, k, v: whole sequences; h is a multiple of g.
        scale: factor of the scores, d ** -0.5 by default.

    Returns:
        out in q's dtype; every query sees at least itself.

    Raises:
        ValueError: shapes that do not fit.

    Tested against the fp64 brute force of nsa.testing.
    """
    bind("causal_attention", q=(q, "b t h d"), k=(k, "b t g d"), v=(v, "b t g e"))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True).transpose(1, 2)
