"""Rotary positions: the angle of a key or query is its position times a frequency (arXiv:2104.09864)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nsa.backend import resolve


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
    """Rotate the pairs (i, i + d/2) of x, as Llama does; without gradients on the kernel, where it serves."""
    plain = torch.is_grad_enabled() or torch.compiler.is_compiling() or not cos.dtype == sin.dtype == x.dtype
    if not plain and x.stride(-1) == 1 and resolve(x, x) == "triton":
        from nsa.kernels.rotary import rotate as on_kernel  # only where triton is installed

        return on_kernel(x, cos, sin)
    low, high = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(2) + torch.cat([-high, low], dim=-1) * sin.unsqueeze(2)
