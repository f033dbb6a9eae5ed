"""Rotary positions: the angle of a key or query is its position times a frequency (arXiv:2104.09864)."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nsa.backend import resolve
from nsa.decode_step import Rotary
from nsa.ops.rotary import rotated


class RotaryEmbedding(nn.Module):
    """cos and sin of position * theta^(-2i/d), for any positions; called as in transformers: rotary(x, positions)."""

    def __init__(self, head_dim: int, theta: float = 10000.0) -> None:
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"RotaryEmbedding: head_dim should be even, got {head_dim}")
        self.head_dim, self.theta = head_dim, theta

    def forward(
        self, x: Tensor, positions: Int[Tensor, "b t"]
    ) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b t d"]]:
        """In x's dtype, on x's device; computed in fp32 (fp64 for fp64)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        exponent = torch.arange(0, self.head_dim, 2, device=x.device, dtype=wide) / self.head_dim
        angles = positions.to(x.device, wide).unsqueeze(-1) * self.theta**-exponent
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def rotate(
    x: Float[Tensor, "b t h d"], cos: Float[Tensor, "_ t d"], sin: Float[Tensor, "_ t d"]
) -> Float[Tensor, "b t h d"]:
    """Rotate the pairs (i, i + d/2) of x, as Llama does, in x's dtype; in one pass on the kernel, where it serves.

    cos and sin are constants: no gradient flows to them on the kernel.
    """
    plain = torch.compiler.is_compiling() or cos.requires_grad or cos.dtype != sin.dtype or x.stride(-1) != 1
    if not plain and resolve(x, x) == "triton":
        return _Rotation.apply(x, cos, sin)
    return rotated(x, cos, sin)


class _Rotation(torch.autograd.Function):
    """A rotation's gradient goes through its inverse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        from nsa.kernels.rotary import rotate as on_kernel  # only where triton is installed

        ctx.save_for_backward(cos, sin)
        return on_kernel(x, cos, sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        from nsa.kernels.rotary import rotate as on_kernel

        return (
            on_kernel(grad if grad.stride(-1) == 1 else grad.contiguous(), *ctx.saved_tensors, inverse=True),
            None,
            None,
        )


class RotaryFactors:
    """cos and sin of evenly spaced positions, each run of them computed once for all layers of one forward pass."""

    def __init__(self, rotary: Rotary) -> None:
        self._rotary = rotary
        self._known: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    def evenly_spaced(
        self, like: Tensor, first: int, count: int, stride: int = 1
    ) -> tuple[Float[Tensor, "1 count d"], Float[Tensor, "1 count d"]]:
        """Of the positions first, first + stride, .. in like's dtype, on its device."""
        key = (first, count, stride, like.dtype, like.device)
        if key not in self._known:
            positions = torch.arange(first, first + count * stride, stride, device=like.device)
            self._known[key] = self._rotary(like, positions[None])
        return self._known[key]
