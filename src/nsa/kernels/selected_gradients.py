"""dq, dk and dv of attention over the selected blocks; in groups of few heads dq too comes from blocks of keys.

As in the forward of few heads (selected_by_block.py), a query gets a part of dq from each block that it selected:
dS K, which dk and dv need dS for anyway (selected_backward.py). The parts lie in the order of the query's slots, in the
inputs' dtype, and are added here in fp32. They take PARTS_BYTES at most: KV heads go in runs, and where one alone has
more parts than that, its queries go in pieces.

merge       grid (queries x heads)
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.backend import PARTS_BYTES
from nsa.config import NSAConfig
from nsa.kernels import selected_by_block as by_block
from nsa.kernels.integers import cdiv
from nsa.kernels.launch import Heads, TileSize, empty, tile_for
from nsa.kernels.layout import Layout
from nsa.kernels.selected_backward import selected_dkdv, write_dkdv
from nsa.kernels.selected_forward import selected_dq
from nsa.kernels.start import start_kernel
from nsa.kernels.tiles import wide

MERGE_ROWS = 16
MAX_WIDTH = 128  # of heads; wider ones take dq and dk, dv apart


@triton.jit(do_not_specialize=["first", "num_rows", "run_heads", "num_heads"])
def merge_dq_kernel(
    parts, block_indices, dq, first, num_rows, run_heads, num_heads,
    G: tl.constexpr, N: tl.constexpr, STEPS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ADD: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Rows are queries x heads of the run, whose parts lie [query, KV head, slot, step, head of the group]."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = rows < num_rows
    d = tl.arange(0, DP)
    pair = wide(rows // G)  # query and KV head
    blocks = block_indices + (wide(first) * (run_heads // G) + pair) * N
    part = parts + ((pair * (N * STEPS * G) + rows % G) * D)[:, None] + d[None, :]
    out = dq + (((wide(first) + rows // run_heads) * num_heads + rows % run_heads) * D)[:, None] + d[None, :]
    mask = exists[:, None] & (d < D)[None, :]
    acc = tl.zeros([ROWS, DP], tl.float32)
    if ADD:
        acc += tl.load(out, mask=mask, other=0.0)
    for i in tl.static_range(N):
        # An empty slot has no parts; nothing was written there.
        is_chosen = tl.load(blocks + i, mask=exists, other=-1) >= 0
        for step in tl.static_range(STEPS):
            acc += tl.load(part + (i * STEPS + step) * (G * D), mask=mask & is_chosen[:, None], other=0.0)
    tl.store(out, acc.to(dq.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class _Parts:
    """Of a run of KV heads, whose slices of block_indices (contiguous) and dq these are."""

    tile: TileSize
    heads: Heads
    num_heads: int  # of the whole dq
    block_indices: Tensor  # [b, t, KV heads of the run, n]
    dq: Tensor
    is_added: bool
    steps: int

    @cached_property
    def pieces(self) -> list[tuple[int, int]]:
        """Runs of the batch's queries."""
        b, t, _, n = self.block_indices.shape
        queries = b * t
        passes = cdiv(queries * n * self.steps * self.heads.h * self.heads.d * self.dq.element_size(), PARTS_BYTES)
        at_once = cdiv(queries, min(passes, queries))
        return [(first, min(first + at_once, queries)) for first in range(0, queries, at_once)]

    @cached_property
    def out(self) -> Tensor:
        first, end = self.pieces[0]
        size = (end - first, self.block_indices.shape[3] * self.steps, self.heads.h, self.heads.d)
        return torch.empty(size, dtype=self.dq.dtype, device=self.dq.device)

    def merge(self, first: int, end: int) -> None:
        rows = (end - first) * self.heads.h
        start_kernel(
            merge_dq_kernel, (cdiv(rows, MERGE_ROWS),),
            self.out, self.block_indices, self.dq, first, rows, self.heads.h, self.num_heads,
            G=self.heads.per_group, N=self.block_indices.shape[3], STEPS=self.steps,
            D=self.heads.d, DP=self.heads.padded_d, ADD=self.is_added, ROWS=MERGE_ROWS, num_warps=4,
        )  # fmt: skip


def selected_gradients(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, d_out: Tensor, lse: Tensor, delta: Tensor,
    layout: Layout, config: NSAConfig, scale: float, add_to: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, added to `add_to` where given, dk and dv."""
    heads = Heads.of(q, k, v)
    wide = max(heads.d, heads.e) > MAX_WIDTH
    if q.numel() == 0 or k.shape[1] == 0 or wide or not by_block.serves(q, heads, config):
        given = (q, k, v, block_indices, d_out, lse, delta, layout, config, scale)
        return selected_dq(*given, add_to=add_to), *selected_dkdv(*given)
    dq = empty(layout, q.shape, q.dtype, q.device) if add_to is None else add_to
    dk, dv = empty(layout, k.shape, k.dtype, k.device), empty(layout, v.shape, v.dtype, v.device)
    tile = tile_for("selected_gradients", heads, q, config.select_block_size)
    steps = cdiv(config.select_block_size, tile.block_n)
    of_one = block_indices[:, :, 0].numel() * steps * heads.per_group * heads.d * q.element_size()
    runs = min(heads.g, cdiv(heads.g, max(1, PARTS_BYTES // of_one)))
    at_once = cdiv(heads.g, runs)
    for first in range(0, heads.g, at_once):
        of_run = slice(first, first + at_once)
        in_run = slice(first * heads.per_group, (first + at_once) * heads.per_group)
        picks = block_indices[:, :, of_run].contiguous()
        q_run, d_out_run, lse_run, delta_run, dq_run = (x[:, :, in_run] for x in (q, d_out, lse, delta, dq))
        k_run, v_run, dk_run, dv_run = (x[:, :, of_run] for x in (k, v, dk, dv))
        parts = _Parts(tile, Heads.of(q_run, k_run, v_run), heads.h, picks, dq_run, add_to is not None, steps)
        write_dkdv(
            q_run, k_run, v_run, picks, d_out_run, lse_run, delta_run, dk_run, dv_run, heads, layout, config, scale,
            parts, runs,
        )  # fmt: skip
    return dq, dk, dv
