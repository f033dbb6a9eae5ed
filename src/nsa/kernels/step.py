"""`nsa.ops.step` in one launch each."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.kernels.tiles import wide

# Numbers of a row that one program gates.
COLUMNS = 1024


@triton.jit
def add_norm_kernel(
    residual, x, weight, total, out, eps, WIDTH: tl.constexpr, PADDED: tl.constexpr, ADDS: tl.constexpr
):
    """Grid (rows); a row is one tile."""
    at = tl.arange(0, PADDED)
    inside = at < WIDTH
    row = wide(tl.program_id(0)) * WIDTH + at
    scale = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    h = tl.load(residual + row, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        h += tl.load(x + row, mask=inside, other=0.0).to(tl.float32)
        h = h.to(total.dtype.element_ty)
        tl.store(total + row, h, mask=inside)
        h = h.to(tl.float32)
    h *= tl.rsqrt(tl.sum(h * h, 0) / WIDTH + eps)
    tl.store(out + row, (h * scale).to(out.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_kernel(gate_and_up, out, width, COLUMNS: tl.constexpr):
    """Grid (columns / COLUMNS, rows)."""
    column, row = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), wide(tl.program_id(1))
    inside = column < width
    gate = tl.load(gate_and_up + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_and_up + (row * 2 + 1) * width + column, mask=inside, other=0.0).to(tl.float32)
    gate = (gate * tl.sigmoid(gate)).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + column, (gate * up).to(out.dtype.element_ty), mask=inside)


def add_norm(residual: Tensor, x: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `nsa.ops.step.add_norm`; shapes are trusted."""
    width = residual.shape[1]
    residual, x = residual.contiguous(), None if x is None else x.contiguous()
    total = residual if x is None else torch.empty_like(residual)
    out = torch.empty_like(residual)
    add_norm_kernel[(len(residual),)](
        residual, x, weight, total, out, eps, WIDTH=width, PADDED=triton.next_power_of_2(width), ADDS=x is not None,
        num_warps=8,
    )  # fmt: skip
    return total, out


def swiglu(gate_and_up: Tensor) -> Tensor:
    """See `nsa.ops.step.swiglu`; shapes are trusted."""
    rows, width = len(gate_and_up), gate_and_up.shape[1] // 2
    out = torch.empty((rows, width), dtype=gate_and_up.dtype, device=gate_and_up.device)
    swiglu_kernel[(triton.cdiv(width, COLUMNS), rows)](
        gate_and_up.contiguous(), out, width, COLUMNS=COLUMNS, num_warps=4
    )
    return out
