"""`nsa.ops.step` in one launch each, for few rows.

Such a product takes as long as its weights take to arrive, so all that a program has to do is to keep many of them on
their way. It reads the weights of some columns, once; its warps divide the width between them, each with sums of its
own, since a chain of products into one accumulator would take longer than the loads. With programmatic launches (Hopper
and later) the next kernel starts when a program's products are done, before it has written them.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nsa.kernels import launch
from nsa.kernels.integers import cdiv, next_power_of_2
from nsa.kernels.tiles import wide

# Rows of x that one launch takes; more are a matter for a matrix library.
MAX_ROWS = 16


@dataclass(frozen=True)
class Plan:
    """Sizes of the programs."""

    columns: int = 16  # of a program
    warps: int = 4
    slice: int = 64  # of the width, for a warp in one step of its loop
    stages: int = 6
    pdl: bool = True  # on Hopper and later, a launch may begin while the one before ends


PLAN = Plan()
GATED_PLAN = Plan(warps=2, slice=128)


@triton.jit(do_not_specialize=["sigmoid_from"])
def project_kernel(
    x, weight, bias, up, add, out, rows, columns, sigmoid_from, stride_x,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SLICES: tl.constexpr, SLICE: tl.constexpr,
    STAGES: tl.constexpr, HAS_SIGMOID: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (columns / COLUMNS). Slices of the width come first, one for each warp."""
    row, column = tl.arange(0, ROWS), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    # Columns past the end compute the last one again, and are not stored.
    there = tl.minimum(column, columns - 1)
    is_row = (row < rows)[None, :, None]
    slices = tl.arange(0, SLICES)[:, None, None] * SLICE + tl.arange(0, SLICE)[None, None, :]
    x_rows = x + (wide(row) * stride_x)[None, :, None]
    weight_rows = weight + (wide(there) * WIDTH)[None, :, None]
    acc = tl.zeros([SLICES, COLUMNS, ROWS], tl.float32)
    if up is not None:
        up_rows = up + (wide(there) * WIDTH)[None, :, None]
        acc_up = tl.zeros([SLICES, COLUMNS, ROWS], tl.float32)
    if PDL:
        gdc_wait()
    for start in tl.range(0, WIDTH, SLICES * SLICE, num_stages=STAGES):
        at = start + slices
        z = tl.permute(_load(x_rows + at, is_row, at, WIDTH, True, SLICES * SLICE), (0, 2, 1))
        w = _load(weight_rows + at, is_row, at, WIDTH, False, SLICES * SLICE)
        acc = tl.dot(w, z, acc, input_precision=PRECISION)
        if up is not None:
            u = _load(up_rows + at, is_row, at, WIDTH, False, SLICES * SLICE)
            acc_up = tl.dot(u, z, acc_up, input_precision=PRECISION)
    if PDL:
        gdc_launch_dependents()
    y = tl.sum(acc, 0)
    if bias is not None:
        y += tl.load(bias + there).to(tl.float32)[:, None]
    # What follows reads the product as the dtype holds it, as separate operations would.
    y = y.to(out.dtype.element_ty).to(tl.float32)
    if up is not None:
        gate = (y * tl.sigmoid(y)).to(out.dtype.element_ty).to(tl.float32)
        y = gate * tl.sum(acc_up, 0).to(out.dtype.element_ty).to(tl.float32)
    if HAS_SIGMOID:
        y = tl.where((column >= sigmoid_from)[:, None], tl.sigmoid(y), y)
    to = (wide(row) * columns)[None, :] + column[:, None]
    inside = (row < rows)[None, :] & (column < columns)[:, None]
    if add is not None:
        y += tl.load(add + to, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + to, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _load(pointers, is_row, at, WIDTH: tl.constexpr, MASK_ROWS: tl.constexpr, STEP: tl.constexpr):
    """A tile [slices, rows or columns, numbers], 0 where masked; a mask that is never needed is not tested."""
    if MASK_ROWS and WIDTH % STEP != 0:
        x = tl.load(pointers, mask=is_row & (at < WIDTH), other=0.0)
    elif MASK_ROWS:
        x = tl.load(pointers, mask=is_row, other=0.0)
    elif WIDTH % STEP != 0:
        x = tl.load(pointers, mask=at < WIDTH, other=0.0)
    else:
        x = tl.load(pointers)
    return x


@triton.jit
def rms_norm_kernel(x, weight, out, stride_x, eps, WIDTH: tl.constexpr, PADDED: tl.constexpr, PDL: tl.constexpr):
    """Grid (rows); a row is one tile."""
    at = tl.arange(0, PADDED)
    inside = at < WIDTH
    scale = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = wide(tl.program_id(0))
    h = tl.load(x + row * stride_x + at, mask=inside, other=0.0).to(tl.float32)
    h *= tl.rsqrt(tl.sum(h * h, 0) / WIDTH + eps)
    tl.store(out + row * WIDTH + at, (h * scale).to(out.dtype.element_ty), mask=inside)


def serves(x: Tensor) -> bool:
    """Whether the kernels are meant for rows x; in fp32, with products on the ordinary units, a library is faster."""
    return x.dtype in (torch.bfloat16, torch.float16) and 0 < len(x) <= MAX_ROWS and x.shape[1] % 16 == 0


def project(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    up: Tensor | None = None,
    sigmoid_from: int | None = None,
    add: Tensor | None = None,
) -> Tensor:
    """See `nsa.ops.step.project`; for rows that `serves` says yes to. Shapes are trusted."""
    (columns, width), plan = weight.shape, PLAN if up is None else GATED_PLAN
    x = x if x.stride(-1) == 1 else x.contiguous()
    weight, up, add = (None if y is None else y.contiguous() for y in (weight, up, add))
    out = torch.empty((len(x), columns), dtype=x.dtype, device=x.device)
    rows = max(8, next_power_of_2(len(x)))
    # As many steps ahead as fit twice into the shared memory.
    tile = plan.warps * plan.slice * (plan.columns * (1 if up is None else 2) + rows) * x.element_size()
    stages = max(2, min(plan.stages, 1 + launch.shared_memory(x.device) // 2 // tile))
    pdl = plan.pdl and launch.is_hopper(x.device)
    project_kernel[(cdiv(columns, plan.columns),)](
        x, weight, bias, up, add, out, len(x), columns, sigmoid_from or 0, x.stride(0), WIDTH=width, ROWS=rows,
        COLUMNS=plan.columns, SLICES=plan.warps, SLICE=plan.slice, STAGES=stages, HAS_SIGMOID=sigmoid_from is not None,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32", PDL=pdl, num_warps=plan.warps,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `nsa.ops.step.rms_norm`; shapes are trusted."""
    rows, width = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    pdl = PLAN.pdl and launch.is_hopper(x.device)
    rms_norm_kernel[(rows,)](
        x, weight, out, x.stride(0), eps, WIDTH=width, PADDED=next_power_of_2(width), PDL=pdl, num_warps=8,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return out
