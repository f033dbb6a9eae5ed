"""Attention to the whole past: what the selected and the window branch are while nothing lies out of their reach."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nsa.ops.tiled_attention import factor
from nsa.ops.tiles import accumulation_dtype, are_finite, without_autocast
from nsa.ops.window_attention import window_attention
from nsa.shapes import bind
from nsa.streams import Stream


def causal_attention(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b t g d"],
    v: Float[Tensor, "b t g e"],
    *,
    scale: float | None = None,
) -> Float[Tensor, "b t h e"]:
    """o_t = Attn(q_t, K, V) over the positions p <= t, by PyTorch's own kernel, in fp32 (fp64 for fp64 inputs).

    That kernel hides some numbers that are not finite and spreads others to queries that do not see them: given such,
    here or to backward, `window_attention` with a window of t computes the same.

    Args:
        q, k, v: whole sequences; h is a multiple of g.
        scale: factor of the scores, d ** -0.5 by default.

    Returns:
        out in q's dtype; every query sees at least itself.

    Raises:
        ValueError: shapes that do not fit, a scale that is not above 0.

    Tested against the fp64 brute force of nsa.testing.
    """
    bind("causal_attention", q=(q, "b t h d"), k=(k, "b t g d"), v=(v, "b t g e"))
    scale = factor(q, scale)
    # In 16 bits the kernel rounds within its sums, too.
    q_wide, k_wide, v_wide = (x.to(accumulation_dtype(q.dtype)) for x in (q, k, v))
    if not are_finite(q_wide, k_wide, v_wide):
        if len(q) > 1:  # what one row holds changes no bit of another
            rows = zip(q.split(1), k.split(1), v.split(1), strict=True)
            return torch.cat([causal_attention(*row, scale=scale) for row in rows])
        return _by_tiles(q, k, v, scale)
    needs_gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    attend = _Causal.apply if needs_gradients else _by_kernel
    return attend(q_wide, k_wide, v_wide, scale).to(q.dtype)


def sees_all(q: Tensor, stream: Stream, size: int) -> bool:
    """Whether a branch that reaches `size` tokens back sees all of the past, and PyTorch has a kernel for that."""
    k, v = stream.k, stream.v
    is_whole = stream.where.is_uniform and 0 < k.shape[1] == q.shape[1] <= size
    return is_whole and q.device.type == "cpu" and k.shape[-1] == v.shape[-1]


class _Causal(torch.autograd.Function):
    """PyTorch's kernel and its gradient, where the output's gradient is finite."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        # Its own graph keeps what it needs: layers that are computed again in backward would be once more for it.
        # Detached, for the kernel saves its output too, and an output that its own graph holds is never freed.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(Tensor.detach, _as_it_is):
            q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
            ctx.inputs, ctx.out, ctx.scale = (q, k, v), _by_kernel(q, k, v, scale), scale
        return ctx.out.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        out = ctx.out
        if not are_finite(d_out):
            with torch.enable_grad():
                q, k, v = ctx.inputs
                out = _by_tiles(q, k, v, ctx.scale)
        return *torch.autograd.grad(out, ctx.inputs, d_out, retain_graph=True), None


def _as_it_is(x: Tensor) -> Tensor:
    return x


@without_autocast
def _by_kernel(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True).transpose(1, 2)


def _by_tiles(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return window_attention(q, k, v, max(1, q.shape[1]), scale=scale)[0]
