"""dk and dv of attention over the selected blocks, by blocks of keys: each gathers the queries that selected it.
On the way dq's part of every pick, where it is wanted (selected_gradients.py).

The inverse index (inverse.py) lists them in order, so sums repeat bit by bit; nothing is added atomically. A popular
block (every query selects the first one) is split into work items; their fp32 sums are added afterwards, in order.

dk, dv      grid (work items, steps of BLOCK_N keys): rows are BLOCK_Q gathered queries x GROUP heads; scores are kept
            transposed, so that P and dS feed the next product from registers
sums        grid (blocks x KV heads, steps)
"""

from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.config import NSAConfig
from nsa.kernels.integers import cdiv
from nsa.kernels.inverse import WORK_ITEMS, invert
from nsa.kernels.launch import Heads, TileSize, empty, tile_for
from nsa.kernels.layout import Layout
from nsa.kernels.start import start_kernel, strides_of
from nsa.kernels.tiles import (
    add_product,
    columns,
    dot_columns,
    load_columns,
    load_rows,
    log2_lse,
    store_columns,
    wide,
    zero_columns,
)


@triton.jit
def keys_of(segment, blocks, block_sequence, block_start, cu_q, cu_k, lengths, num_queries, num_keys, num_rows,
             LAYOUT: tl.constexpr):  # fmt: skip
    """KV head, row, block in its sequence; the sequence's first query row, queries, first key row, keys."""
    group, block = wide(segment // blocks), segment % blocks
    if LAYOUT == 1:
        sequence = tl.load(block_sequence + block)
        block -= tl.load(block_start + sequence)
        row = block * 0
        q_start = tl.load(cu_q + sequence)
        t = tl.load(cu_q + sequence + 1) - q_start
        k_start = tl.load(cu_k + sequence)
        s = tl.load(cu_k + sequence + 1) - k_start
    else:
        row = block // (blocks // num_rows)
        block = block % (blocks // num_rows)
        q_start = row * num_queries
        t = num_queries
        k_start = row * 0
        s = tl.load(lengths + row) if LAYOUT == 2 else num_keys
    return group, row, block, q_start, t, k_start, s


@triton.jit
def _load_statistics(lse, delta, flat, mask, num_heads):
    at = flat.to(tl.int64) * num_heads
    return tl.load(lse + at, mask=mask, other=float("-inf")), tl.load(delta + at, mask=mask, other=0.0)


@triton.jit
def _dkdv_range(
    dk, dv, k, v, keys, q, d_out, lse, delta, picks, parts, begin, end, row_start, first_position, num_heads, part_pick,
    part_query, stride_qt, stride_ot, scale, MASKED: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr,
    G: tl.constexpr, GP: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, DR: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    BLOCK_Q: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The queries of picks[begin:end]; q, d_out, lse, delta and parts point to the rows' heads."""
    scale_log2 = scale * 1.4426950408889634
    rows = tl.arange(0, BLOCK_Q * GP)
    query, head = rows // GP, rows % GP
    e = tl.arange(0, EP)
    listed = picks + query
    q_rows = columns(q[:, None], DP, DR)
    flat = tl.load(listed + begin, mask=begin + query < end, other=0) // N
    next_lse, next_delta = _load_statistics(lse, delta, flat, (begin + query < end) & (head < G), num_heads)
    next_flat = tl.load(listed + begin + BLOCK_Q, mask=begin + BLOCK_Q + query < end, other=0) // N
    for start in tl.range(begin, end, BLOCK_Q):
        row_mask = (start + query < end) & (head < G)
        pick = tl.load(listed + start, mask=start + query < end, other=0)
        flat = pick // N
        column = flat.to(tl.int64) - row_start
        q_tile = load_columns(q_rows, (column * stride_qt)[:, None], row_mask, True, D, DP, DR)
        o_tile = load_rows(d_out[:, None] + (column * stride_ot)[:, None] + e[None, :], row_mask, e < E, True, E != EP)
        # The statistics are loaded an iteration ahead and their addresses two: no product waits for them.
        row_lse, row_delta = next_lse, next_delta
        in_next = (start + BLOCK_Q + query < end) & (head < G)
        next_lse, next_delta = _load_statistics(lse, delta, next_flat, in_next, num_heads)
        next_flat = tl.load(listed + start + 2 * BLOCK_Q, mask=start + 2 * BLOCK_Q + query < end, other=0) // N
        scores = dot_columns(k, q_tile, DR, PRECISION)
        p = tl.exp2(scores * scale_log2 - log2_lse(row_lse)[None, :])
        if MASKED:
            p = tl.where(keys[:, None] <= (first_position + flat)[None, :], p, 0.0)
        dv = tl.dot(p.to(o_tile.dtype), o_tile, dv, input_precision=PRECISION)
        d_p = tl.dot(v, tl.trans(o_tile), input_precision=PRECISION)
        d_s = p * (d_p - row_delta[None, :])
        dk = add_product(dk, d_s, q_tile, DR, PRECISION)
        if PARTS:
            part = add_product(zero_columns(BLOCK_Q * GP, DP, DR), tl.trans(d_s), k, DR, PRECISION)
            at = flat.to(tl.int64) * part_query + pick % N * part_pick
            to = columns(parts[:, None] + (at * D)[:, None], DP, DR)
            store_columns(to, part, scale, row_mask, D, DP, DR)
    return dk, dv


@triton.jit
def _before(picks, begin, end, pick):
    """How many of picks[begin:end], which ascend, are less."""
    count = begin * 0
    for start in tl.range(begin, end, 512):
        at = start + tl.arange(0, 512)
        count += tl.sum((tl.load(picks + at, mask=at < end, other=pick) < pick).to(tl.int32), 0)
    return count


@triton.jit(do_not_specialize=["blocks", "num_queries", "num_keys", "num_rows", "per_item", "first_query", "end_query"])
def selected_dkdv_kernel(
    q, k, v, d_out, lse, delta, dk, dv, parts, picks, segment_start, item_start, item_segment, where,
    segments, blocks, num_queries, num_keys, num_rows, num_heads, per_item, first_query, end_query, scale, strides,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DR: tl.constexpr,
    E: tl.constexpr, EP: tl.constexpr, SELECT: tl.constexpr, LAYOUT: tl.constexpr,
    N: tl.constexpr, PARTS: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """SPLIT: of the queries first_query .. end_query only, added to what the queries before them gave."""
    block_sequence, block_start, cu_q, cu_k, lengths = where
    (stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kg, stride_vb, stride_vs, stride_vg, stride_ob,
     stride_ot, stride_oh) = strides  # fmt: skip
    item = tl.program_id(0)
    if item >= tl.load(item_start + segments):
        return
    segment = tl.load(item_segment + item)
    first = tl.load(segment_start + segment)
    begin = first + (item - tl.load(item_start + segment)) * per_item
    end = tl.minimum(begin + per_item, tl.load(segment_start + segment + 1))
    if SPLIT:
        before = _before(picks, begin, end, first_query * N)
        end = begin + _before(picks, begin, end, end_query * N)
        begin += before
        if begin >= end:
            return
    # Queries inside the block are the first of its list, and at most as many as it has keys; the others see all of it.
    past = begin + tl.cdiv(tl.maximum(tl.minimum(first + SELECT, end) - begin, 0), BLOCK_Q) * BLOCK_Q
    past = tl.minimum(past, end)
    group, row, block, q_start, t, k_start, s = keys_of(
        segment, blocks, block_sequence, block_start, cu_q, cu_k, lengths, num_queries, num_keys, num_rows, LAYOUT
    )
    in_block = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    keys = block * SELECT + in_block
    key_mask = (keys < s) & (in_block < SELECT)
    e = tl.arange(0, EP)
    k_base = (k_start + block * SELECT).to(tl.int64)
    k_rows = k + row.to(tl.int64) * stride_kb + k_base * stride_ks + group * stride_kg
    v_rows = v + row.to(tl.int64) * stride_vb + k_base * stride_vs + group * stride_vg
    k_tile = load_columns(columns(k_rows + in_block[:, None] * stride_ks, DP, DR), 0, key_mask, True, D, DP, DR)
    v_tile = load_rows(v_rows + in_block[:, None] * stride_vs + e[None, :], key_mask, e < E, True, E != EP)
    rows = tl.arange(0, BLOCK_Q * GP)
    head = rows % GP
    q_heads = q + row.to(tl.int64) * stride_qb + group * G * stride_qh + wide(head) * stride_qh
    o_heads = d_out + row.to(tl.int64) * stride_ob + group * G * stride_oh + wide(head) * stride_oh
    flat_heads = group * G + head
    # A pick's parts lie [query, KV head, slot, step, head of the group].
    steps = tl.num_programs(1)
    part_pick = steps * G
    part_query = (segments // blocks) * N * part_pick
    if PARTS:
        part_head = (group * N * steps + tl.program_id(1)) * G + head - wide(first_query) * part_query
        parts += part_head * D
        if SELECT % BLOCK_N != 0:
            # Keys of the next block are masked as if they were not seen yet.
            keys = tl.where(in_block < SELECT, keys, 0x7FFFFFFF)
    MASK_PAST: tl.constexpr = PARTS and SELECT % BLOCK_N != 0
    # Rows of q are counted over the batch in the index, in its own row here; they are one for packed sequences.
    row_start = row.to(tl.int64) * num_queries
    dk_sum = zero_columns(BLOCK_N, DP, DR)
    dv_sum = tl.zeros([BLOCK_N, EP], tl.float32)
    dk_sum, dv_sum = _dkdv_range(
        dk_sum, dv_sum, k_tile, v_tile, keys, q_heads, o_heads, lse + flat_heads, delta + flat_heads, picks, parts,
        begin, past, row_start, s - t - q_start, num_heads, part_pick, part_query, stride_qt, stride_ot, scale,
        True, N, PARTS, G, GP, D, DP, DR, E, EP, BLOCK_Q, PRECISION,
    )  # fmt: skip
    dk_sum, dv_sum = _dkdv_range(
        dk_sum, dv_sum, k_tile, v_tile, keys, q_heads, o_heads, lse + flat_heads, delta + flat_heads, picks, parts,
        past, end, row_start, s - t - q_start, num_heads, part_pick, part_query, stride_qt, stride_ot, scale,
        MASK_PAST, N, PARTS, G, GP, D, DP, DR, E, EP, BLOCK_Q, PRECISION,
    )  # fmt: skip
    out = (item.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * BLOCK_N
    out_rows = out + tl.arange(0, BLOCK_N)
    dk_rows = columns(dk + out_rows[:, None] * (DP + DR), DP, DR)
    dv_rows = dv + out_rows[:, None] * EP + e[None, :]
    dk_main = dk_sum[0] * scale
    if SPLIT:
        dk_main += tl.load(dk_rows[0], mask=before > 0, other=0.0)
        dv_sum += tl.load(dv_rows, mask=before > 0, other=0.0)
    tl.store(dk_rows[0], dk_main)
    if DR > 0:
        dk_rest = dk_sum[1] * scale
        if SPLIT:
            dk_rest += tl.load(dk_rows[1], mask=before > 0, other=0.0)
        tl.store(dk_rows[1], dk_rest)
    tl.store(dv_rows, dv_sum)


@triton.jit(do_not_specialize=["blocks", "num_queries", "num_keys", "num_rows", "per_item"])
def sum_items_kernel(
    dk_items, dv_items, dk, dv, segment_start, item_start, block_sequence, block_start, cu_q, cu_k, lengths,
    blocks, num_queries, num_keys, num_rows, num_groups, per_item,
    D: tl.constexpr, DP: tl.constexpr, DS: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    SELECT: tl.constexpr, LAYOUT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(0)
    group, row, block, _, _, k_start, s = keys_of(
        segment, blocks, block_sequence, block_start, cu_q, cu_k, lengths, num_queries, num_keys, num_rows, LAYOUT
    )
    in_block = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    keys = block * SELECT + in_block
    # The rows of a ragged batch are written past their lengths too, as zeros.
    write = (keys < (s if LAYOUT == 1 else num_keys)) & (in_block < SELECT)
    d, e = tl.arange(0, DP), tl.arange(0, EP)
    dk_sum = tl.zeros([BLOCK_N, DP], tl.float32)
    dv_sum = tl.zeros([BLOCK_N, EP], tl.float32)
    listed = tl.load(segment_start + segment + 1) - tl.load(segment_start + segment)
    first_item = tl.load(item_start + segment)
    for item in tl.range(first_item, first_item + tl.cdiv(listed, per_item)):
        rows = (wide(item) * tl.num_programs(1) + tl.program_id(1)) * BLOCK_N + tl.arange(0, BLOCK_N)
        dk_sum += load_rows(dk_items + rows[:, None] * DS + d[None, :], write, d < D, False, D != DP)
        dv_sum += tl.load(dv_items + rows[:, None] * EP + e[None, :])
    out = (row.to(tl.int64) * num_keys + k_start + keys) * num_groups + group
    tl.store(dk + out[:, None] * D + d[None, :], dk_sum.to(dk.dtype.element_ty), mask=write[:, None] & (d < D)[None, :])
    tl.store(dv + out[:, None] * E + e[None, :], dv_sum.to(dv.dtype.element_ty), mask=write[:, None] & (e < E)[None, :])


class DqParts(Protocol):
    """Takes dq's parts while dk and dv are computed; `selected_gradients` has the one there is."""

    tile: TileSize
    out: Tensor
    pieces: list[tuple[int, int]]  # of the batch's queries, in order: `out` has room for the parts of one

    def merge(self, first: int, end: int) -> None: ...


def selected_dkdv(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, d_out: Tensor, lse: Tensor, delta: Tensor,
    layout: Layout, config: NSAConfig, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if q.numel() == 0 or k.shape[1] == 0:
        return k.new_zeros(k.shape), v.new_zeros(v.shape)
    dk, dv = empty(layout, k.shape, k.dtype, k.device), empty(layout, v.shape, v.dtype, v.device)
    heads = Heads.of(q, k, v)
    write_dkdv(q, k, v, block_indices, d_out, lse, delta, dk, dv, heads, layout, config, scale)
    return dk, dv


def write_dkdv(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, d_out: Tensor, lse: Tensor, delta: Tensor,
    dk: Tensor, dv: Tensor, of: Heads, layout: Layout, config: NSAConfig, scale: float,
    parts: DqParts | None = None, runs: int = 1,
) -> None:  # fmt: skip
    """Of all heads, or of one of the `runs` of KV heads: slices of tensors that have the heads `of`."""
    heads = Heads.of(q, k, v)
    # A run has less work; in as many items their sums would weigh.
    index = invert(block_indices, layout, config, WORK_ITEMS // min(runs, 4))
    tile = parts.tile if parts else tile_for("selected_dkdv", heads, q, config.select_block_size)
    steps = cdiv(config.select_block_size, tile.block_n)
    dk_items, dv_items = (
        torch.empty((index.items, steps * tile.block_n, width), dtype=torch.float32, device=q.device)
        for width in (sum(heads.split_d), heads.padded_e)
    )
    segments = heads.g * index.blocks
    where = (index.block_sequence, index.block_start, layout.cu_q, layout.cu_k, layout.lengths)
    pieces = parts.pieces if parts else [(0, layout.b * layout.t)]
    for first, end in pieces:
        start_kernel(
            selected_dkdv_kernel, (index.items, steps),
            q, k, v, d_out, lse, delta, dk_items, dv_items, parts.out if parts else None,
            index.picks, index.segment_start, index.item_start, index.item_segment, where,
            segments, index.blocks, layout.t, layout.s, layout.b, of.h, index.per_item, first, end, scale,
            strides_of(q, k, v, d_out),
            **heads.constants, SELECT=config.select_block_size, LAYOUT=layout.kind, N=block_indices.shape[3],
            PARTS=parts is not None, SPLIT=len(pieces) > 1, **tile.constants,
        )  # fmt: skip
        if parts:
            parts.merge(first, end)
    start_kernel(
        sum_items_kernel, (segments, steps),
        dk_items, dv_items, dk, dv, index.segment_start, index.item_start, *where,
        index.blocks, layout.t, layout.s, layout.b, of.g, index.per_item,
        D=heads.d, DP=heads.padded_d, DS=sum(heads.split_d), E=heads.e, EP=heads.padded_e,
        SELECT=config.select_block_size, LAYOUT=layout.kind, BLOCK_N=tile.block_n, num_warps=8,
    )  # fmt: skip
