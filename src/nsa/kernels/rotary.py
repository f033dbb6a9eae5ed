"""Rotary positions in one pass over memory, forwards and backwards; `nsa.modules.rotary.rotate` says what it computes.

Grid (tokens x heads, rows of the batch). In fp32, rounded once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.kernels.integers import cdiv, next_power_of_2
from nsa.kernels.start import start_kernel
from nsa.kernels.tiles import wide

ROWS = 64


@triton.jit(do_not_specialize=["num_rows"])
def rotate_kernel(
    x, cos, sin, out, num_rows, stride_xb, stride_xt, stride_xh, stride_cb,
    H: tl.constexpr, HALF: tl.constexpr, HALF_PADDED: tl.constexpr, ROWS: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    batch = wide(tl.program_id(1))
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, head = wide(rows // H), wide(rows % H)
    i = tl.arange(0, HALF_PADDED)
    mask = (rows < num_rows)[:, None] & (i < HALF)[None, :]
    at = (batch * stride_xb + token * stride_xt + head * stride_xh)[:, None] + i[None, :]
    low = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(x + at + HALF, mask=mask, other=0.0).to(tl.float32)
    factor = (batch * stride_cb + token * (2 * HALF))[:, None] + i[None, :]
    cos_low = tl.load(cos + factor, mask=mask, other=0.0).to(tl.float32)
    sin_low = tl.load(sin + factor, mask=mask, other=0.0).to(tl.float32)
    cos_high = tl.load(cos + factor + HALF, mask=mask, other=0.0).to(tl.float32)
    sin_high = tl.load(sin + factor + HALF, mask=mask, other=0.0).to(tl.float32)
    if INVERSE:  # the transposed rotation: what a gradient goes through
        sin_low, sin_high = -sin_high, -sin_low
    to = out + ((batch * num_rows + rows) * (2 * HALF))[:, None] + i[None, :]
    tl.store(to, (low * cos_low - high * sin_low).to(out.dtype.element_ty), mask=mask)
    tl.store(to + HALF, (high * cos_high + low * sin_high).to(out.dtype.element_ty), mask=mask)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> Tensor:
    """x [b, t, h, d] with its last dimension side by side; cos, sin [b or 1, t, d] in any dtype."""
    b, t, h, d = x.shape
    cos, sin = cos.contiguous(), sin.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    half_padded = next_power_of_2(d // 2)
    rows = min(ROWS, 4096 // half_padded)  # what registers hold
    if out.numel():
        with torch.cuda.device_of(x):
            start_kernel(
                rotate_kernel, (cdiv(t * h, rows), b),
                x, cos, sin, out, t * h, *x.stride()[:3], 0 if cos.shape[0] == 1 else t * d,
                H=h, HALF=d // 2, HALF_PADDED=half_padded, ROWS=rows, INVERSE=inverse, num_warps=4,
            )  # fmt: skip
    return out
