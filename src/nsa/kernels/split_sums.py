"""dk and dv of a key tile whose queries several programs share: their fp32 sums added in order, in one launch for both.

Grid (elements / BLOCK, dk or dv).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.kernels.integers import cdiv
from nsa.kernels.start import start_kernel
from nsa.kernels.tiles import wide

BLOCK = 1024


@triton.jit(do_not_specialize=["size_k", "size_v", "splits"])
def sum_splits_kernel(dk_parts, dv_parts, dk, dv, size_k, size_v, splits, BLOCK: tl.constexpr):
    parts, out, size = dk_parts, dk, wide(size_k)
    if tl.program_id(1) == 1:
        parts, out, size = dv_parts, dv, wide(size_v)
    at = wide(tl.program_id(0)) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    total = tl.zeros([BLOCK], tl.float32)
    for split in tl.range(0, splits):
        total += tl.load(parts + split * size + at, mask=mask, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)


def sum_splits(dk_parts: Tensor, dv_parts: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    sizes = (dk.numel(), dv.numel())
    start_kernel(
        sum_splits_kernel, (cdiv(max(sizes), BLOCK), 2), dk_parts, dv_parts, dk, dv, *sizes, len(dk_parts),
        BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return dk, dv
