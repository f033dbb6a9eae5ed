"""`nsa.ops.project` in one launch, for few rows: a program reads the weights of some columns, once.

Such a product takes as long as its weights take to arrive. With programmatic launches (Hopper and later) a program
starts while the kernel before still runs, and asks for the first of its weights, which no kernel writes, before it
waits for x. The sum of squares of the norm is gathered beside the product and divides it at the end, so that x is read
once.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nsa.kernels import launch
from nsa.kernels.tiles import load_rows, wide

# Rows of x that one launch takes; more are a matter for a matrix library.
MAX_ROWS = 64


@dataclass(frozen=True)
class Plan:
    """Sizes of the programs."""

    columns: int = 16  # of a program
    block: int = 256  # of the width, in one step of its loop
    warps: int = 4
    stages: int = 4
    ahead: int = 2048  # of the width, asked for before the wait
    pdl: bool = True  # on Hopper and later, a launch may begin while the one before ends


PLAN = Plan()


@triton.jit
def _ask_for(weight_rows, WIDTH: tl.constexpr, AHEAD: tl.constexpr):
    """The first AHEAD numbers of every row of weights into the L2, a line of 128 bytes at a time."""
    LINE: tl.constexpr = 1024 // weight_rows.dtype.element_ty.primitive_bitwidth
    LINES: tl.constexpr = AHEAD // LINE
    at = tl.minimum(tl.arange(0, LINES) * LINE, WIDTH - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [weight_rows[:, None] + at[None, :]],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["sigmoid_from"])
def project_kernel(
    x, weight, bias, norm, up, add, out, rows, columns, sigmoid_from, eps, stride_x,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    AHEAD: tl.constexpr, HAS_SIGMOID: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row, column = tl.arange(0, ROWS), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    # Columns past the end compute the last one again, and are not stored.
    there = tl.minimum(column, columns - 1)
    weight_rows = weight + wide(there) * WIDTH
    if up is not None:
        up_rows = up + wide(there) * WIDTH
    if PDL:
        gdc_launch_dependents()
        _ask_for(weight_rows, WIDTH, AHEAD)
        if up is not None:
            _ask_for(up_rows, WIDTH, AHEAD)
        gdc_wait()
    is_row = row < rows
    x_rows = x + wide(row) * stride_x
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    acc_up = tl.zeros([ROWS, COLUMNS], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    RAGGED: tl.constexpr = WIDTH % BLOCK != 0
    for start in tl.range(0, WIDTH, BLOCK, num_stages=STAGES):
        at = start + tl.arange(0, BLOCK)
        inside = at < WIDTH
        z = load_rows(x_rows[:, None] + at[None, :], is_row, inside, True, RAGGED)
        w = load_rows(weight_rows[:, None] + at[None, :], is_row, inside, False, RAGGED)
        if norm is not None:
            scale = load_rows((norm + at)[None, :], is_row, inside, False, RAGGED)
            wider = z.to(tl.float32)
            squares += tl.sum(wider * wider, 1)
            z = (wider * scale.to(tl.float32)).to(z.dtype)
        acc = tl.dot(z, tl.trans(w), acc, input_precision=PRECISION)
        if up is not None:
            u = load_rows(up_rows[:, None] + at[None, :], is_row, inside, False, RAGGED)
            acc_up = tl.dot(z, tl.trans(u), acc_up, input_precision=PRECISION)
    if norm is not None:
        scale_row = tl.rsqrt(squares / WIDTH + eps)[:, None]
        acc *= scale_row
        acc_up *= scale_row
    if bias is not None:
        acc += tl.load(bias + there).to(tl.float32)[None, :]
    # What follows reads the product as the dtype holds it, as separate operations would.
    y = acc.to(out.dtype.element_ty).to(tl.float32)
    if up is not None:
        gate = (y * tl.sigmoid(y)).to(out.dtype.element_ty).to(tl.float32)
        y = gate * acc_up.to(out.dtype.element_ty).to(tl.float32)
    if HAS_SIGMOID:
        y = tl.where((column >= sigmoid_from)[None, :], tl.sigmoid(y), y)
    to = (wide(row) * columns)[:, None] + column[None, :]
    mask = is_row[:, None] & (column < columns)[None, :]
    if add is not None:
        y += tl.load(add + to, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + to, y.to(out.dtype.element_ty), mask=mask)


def serves(x: Tensor) -> bool:
    """Whether the kernel takes rows x; fp16 is left out, in which x times the norm's weight could pass the largest."""
    return x.dtype in (torch.bfloat16, torch.float32) and 0 < len(x) <= MAX_ROWS


def project(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    up: Tensor | None = None,
    sigmoid_from: int | None = None,
    add: Tensor | None = None,
) -> Tensor:
    """See `nsa.ops.project.project`; for rows that `serves` says yes to. Shapes are trusted."""
    columns, width = weight.shape
    x, weight = (y if y.stride(-1) == 1 else y.contiguous() for y in (x, weight.contiguous()))
    up, add = (None if y is None else y.contiguous() for y in (up, add))
    out = torch.empty((len(x), columns), dtype=x.dtype, device=x.device)
    pdl = PLAN.pdl and launch.is_hopper(x.device)
    project_kernel[(triton.cdiv(columns, PLAN.columns),)](
        x, weight, bias, norm, up, add, out, len(x), columns, sigmoid_from or 0, eps, x.stride(0),
        WIDTH=width, ROWS=max(16, triton.next_power_of_2(len(x))), COLUMNS=PLAN.columns, BLOCK=PLAN.block,
        STAGES=PLAN.stages, AHEAD=min(PLAN.ahead, triton.next_power_of_2(width)),
        HAS_SIGMOID=sigmoid_from is not None,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32", PDL=pdl, num_warps=PLAN.warps,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return out
