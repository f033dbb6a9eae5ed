"""What is computed row by row, limited by memory alone: the gated sum, its gradients, and rowsum(d_out * out).

Grid (rows / ROWS) over the [b, t, h] rows of the outputs. Gates are read in their own dtype and not rounded.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.kernels.integers import cdiv, next_power_of_2
from nsa.kernels.start import start_kernel

ROWS = 16


@triton.jit
def sign_of(x):
    return (x > 0).to(tl.float32) - (x < 0).to(tl.float32)


@triton.jit
def combine_kernel(
    out_cmp, out_slc, out_win, gates, out, num_rows, E: tl.constexpr, EP: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, EP)
    row_mask = rows < num_rows
    mask = row_mask[:, None] & (e < E)[None, :]
    at = rows[:, None] * E + e[None, :]
    gate_cmp = tl.load(gates + rows * 3, mask=row_mask, other=0.0).to(tl.float32)[:, None]
    gate_slc = tl.load(gates + rows * 3 + 1, mask=row_mask, other=0.0).to(tl.float32)[:, None]
    gate_win = tl.load(gates + rows * 3 + 2, mask=row_mask, other=0.0).to(tl.float32)[:, None]
    total = gate_cmp * tl.load(out_cmp + at, mask=mask, other=0.0).to(tl.float32)
    total += gate_slc * tl.load(out_slc + at, mask=mask, other=0.0).to(tl.float32)
    total += gate_win * tl.load(out_win + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def gates_backward_kernel(
    out_cmp, out_slc, out_win, lse_cmp, lse_slc, lse_win, gates, d_out, d_gates, deltas, gated_lses, num_rows,
    SIGNED: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, EP)
    row_mask = rows < num_rows
    mask = row_mask[:, None] & (e < E)[None, :]
    at = rows[:, None] * E + e[None, :]
    d_o = tl.load(d_out + at, mask=mask, other=0.0).to(tl.float32)
    for branch in tl.static_range(3):
        if branch == 0:
            o, lse = out_cmp, lse_cmp
        elif branch == 1:
            o, lse = out_slc, lse_slc
        else:
            o, lse = out_win, lse_win
        gate = tl.load(gates + rows * 3 + branch, mask=row_mask, other=1.0).to(tl.float32)
        row_lse = tl.load(lse + rows, mask=row_mask, other=0.0)
        dot = tl.sum(d_o * tl.load(o + at, mask=mask, other=0.0).to(tl.float32), 1)
        tl.store(d_gates + rows * 3 + branch, dot.to(d_gates.dtype.element_ty), mask=row_mask)
        if SIGNED:
            dot *= sign_of(gate)
            gate = tl.abs(gate)
        to = branch * num_rows.to(tl.int64) + rows
        tl.store(deltas + to, dot, mask=row_mask)
        # An empty row stays -inf whatever its gate; a gate of 0 gives +inf, and both give P = 0.
        gated = tl.where(row_lse == float("-inf"), row_lse, row_lse - tl.log(gate))
        tl.store(gated_lses + to, gated, mask=row_mask)


@triton.jit
def signed_kernel(
    d_out, gates, signed, branch, num_rows, E: tl.constexpr, EP: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, EP)
    row_mask = rows < num_rows
    mask = row_mask[:, None] & (e < E)[None, :]
    at = rows[:, None] * E + e[None, :]
    sign = sign_of(tl.load(gates + rows * 3 + branch, mask=row_mask, other=0.0).to(tl.float32))
    d_o = tl.load(d_out + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(signed + at, (d_o * sign[:, None]).to(signed.dtype.element_ty), mask=mask)


@triton.jit
def delta_kernel(
    out, d_out, d_lse, delta, num_rows, HAS_D_LSE: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, EP)
    row_mask = rows < num_rows
    mask = row_mask[:, None] & (e < E)[None, :]
    at = rows[:, None] * E + e[None, :]
    x = tl.load(out + at, mask=mask, other=0.0).to(tl.float32)
    dot = tl.sum(x * tl.load(d_out + at, mask=mask, other=0.0).to(tl.float32), 1)
    if HAS_D_LSE:
        dot -= tl.load(d_lse + rows, mask=row_mask, other=0.0)
    tl.store(delta + rows, dot, mask=row_mask)


def combine(out_cmp: Tensor, out_slc: Tensor, out_win: Tensor, gates: Tensor) -> Tensor:
    out = torch.empty(out_cmp.shape, dtype=out_cmp.dtype, device=out_cmp.device)
    num_rows, grid, sizes = _sizes(out)
    if num_rows:
        start_kernel(combine_kernel, grid, out_cmp, out_slc, out_win, gates, out, num_rows, **sizes)
    return out


def gates_backward(
    outs: tuple[Tensor, Tensor, Tensor], lses: tuple[Tensor, Tensor, Tensor], gates: Tensor, d_out: Tensor,
    nonnegative: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """d_gates; deltas and gated lses, fp32 [3, b, t, h]: with them each branch's backward takes d_out as it is.

    The gate's gradient is rowsum(d_out * out) of its branch, which is also the branch's delta. With
    P' = g P = exp(S - (lse - log g)), dV = P'^T d_out and dS = P' (dP - delta) are the gated branch's gradients.
    A negative gate has no logarithm: its gradients are NaN, unless `nonnegative` is False. Then its size takes its
    place in the lse, and deltas have its sign, to be used with `signed_by_gate`.
    """
    d_gates = torch.empty_like(gates)
    deltas = torch.empty((3, *d_out.shape[:3]), dtype=torch.float32, device=d_out.device)
    gated_lses = torch.empty_like(deltas)
    num_rows, grid, sizes = _sizes(d_out)
    if num_rows:
        start_kernel(
            gates_backward_kernel, grid, *outs, *lses, gates, d_out, d_gates, deltas, gated_lses, num_rows,
            SIGNED=not nonnegative, **sizes,
        )  # fmt: skip
    return d_gates, deltas, gated_lses


def signed_by_gate(d_out: Tensor, gates: Tensor, branch: int) -> Tensor:
    """d_out times the sign (-1, 0, 1) of a branch's gate."""
    signed = torch.empty_like(d_out)
    num_rows, grid, sizes = _sizes(d_out)
    if num_rows:
        start_kernel(signed_kernel, grid, d_out, gates, signed, branch, num_rows, **sizes)
    return signed


def rowsum_delta(out: Tensor, d_out: Tensor, d_lse: Tensor | None) -> Tensor:
    """rowsum(d_out * out) - d_lse, fp32 [b, t, h]."""
    delta = torch.empty(out.shape[:3], dtype=torch.float32, device=out.device)
    num_rows, grid, sizes = _sizes(out)
    d_lse = None if d_lse is None else d_lse.to(torch.float32).contiguous()
    if num_rows:
        start_kernel(delta_kernel, grid, out, d_out, d_lse, delta, num_rows, HAS_D_LSE=d_lse is not None, **sizes)
    return delta


def _sizes(out: Tensor) -> tuple[int, tuple[int], dict[str, int]]:
    num_rows = out.shape[0] * out.shape[1] * out.shape[2]
    if out.shape[3] == 0:
        num_rows = 0
    sizes = {"E": out.shape[3], "EP": next_power_of_2(max(1, out.shape[3])), "ROWS": ROWS}
    return num_rows, (cdiv(num_rows, ROWS),), sizes
