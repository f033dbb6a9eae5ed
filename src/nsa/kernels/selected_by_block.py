"""Attention over the selected blocks by blocks of keys, for groups of few heads: each block meets the queries it has.

A tile of queries that walks the union of its blocks (`selected_forward`) shares them among the heads of a group. With
few heads its rows are many queries, whose blocks differ, and most of what it computes is masked. Here a tile's rows are
the queries that selected one block, which is loaded once for all of them, and no row is masked but at a list's end and
for the queries inside the block. What a query gets from a block is a part: output, greatest score and sum, in a place
of its own. The parts of a query are then added in the order of its slots.

count       grid (picks): how many queries each segment has: (KV head, block of the batch), and the same once more for
            the queries that lie inside the block, which alone need a mask
starts      grid (segments): where each list begins, and its work items
lists       grid (picks): the picks of each segment
parts       grid (work items): rows are BLOCK_Q listed queries x GROUP heads
merge       grid (queries x heads)

Lists are placed and filled by counters, in whatever order programs come. That decides which rows share a tile and
nothing else: a row's result does not depend on the rows beside it, so results repeat bit by bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.backend import PARTS_BYTES, SMALL_GROUP
from nsa.config import NSAConfig
from nsa.kernels.integers import cdiv, next_power_of_2
from nsa.kernels.launch import Heads, TileSize, tile_for
from nsa.kernels.layout import PACKED, Layout
from nsa.kernels.selected_backward import keys_of
from nsa.kernels.start import start_kernel, strides_of
from nsa.kernels.tiles import LN2, columns, dot_columns, load_columns, load_rows, wide

MAX_SELECT, MAX_D, MAX_E = 128, 192, 128
# Rows of a work item: enough to load a block of keys once for many.
ITEM_ROWS = 512
PICKS = 512  # in a program of count and lists
# A segment has as many counters, by where in the pass a query is, as there are room for: few would be fought over.
COUNTERS = 16384
SEGMENTS = 512  # in a program of starts
MERGE_ROWS = 16


def serves(q: Tensor, heads: Heads, config: NSAConfig) -> bool:
    return (
        q.element_size() == 2
        and heads.per_group <= SMALL_GROUP
        and heads.d <= MAX_D
        and heads.e <= MAX_E
        and config.select_block_size <= MAX_SELECT
    )


@triton.jit
def _pick(
    block_indices, first, total, token_sequence, block_start, cu_q, cu_k, lengths, blocks, num_queries, num_keys,
    num_rows, GROUPS: tl.constexpr, N: tl.constexpr, SELECT: tl.constexpr, LAYOUT: tl.constexpr,
    SPREAD: tl.constexpr, PICKS: tl.constexpr,
):  # fmt: skip
    """Picks [query, KV head, slot] of this program, whether there are such, whether they name a block; its segment, and
    which of the segment's counters is theirs."""
    pick = tl.program_id(0) * PICKS + tl.arange(0, PICKS)
    exists = pick < total
    flat = first + pick // (GROUPS * N)
    block = tl.load(block_indices + wide(first) * (GROUPS * N) + pick, mask=exists, other=-1).to(tl.int32)
    if LAYOUT == 1:
        sequence = tl.load(token_sequence + flat, mask=exists, other=0)
        q_start = tl.load(cu_q + sequence)
        t = tl.load(cu_q + sequence + 1) - q_start
        s = tl.load(cu_k + sequence + 1) - tl.load(cu_k + sequence)
        column = flat - q_start
        first_block = tl.load(block_start + sequence)
    else:
        row = flat // num_queries
        t = num_queries
        s = tl.load(lengths + row, mask=exists, other=0) if LAYOUT == 2 else num_keys
        column = flat % num_queries
        first_block = row * (blocks // num_rows)
    position = s - t + column
    chosen = exists & (block >= 0) & (column < t) & (block * SELECT <= position)
    segment = (pick // N % GROUPS) * blocks + first_block + block
    segment += tl.where(block * SELECT + (SELECT - 1) > position, GROUPS * blocks, 0)
    return pick, exists, chosen, segment, pick // tl.cdiv(total, SPREAD)


@triton.jit(do_not_specialize=["first", "total", "blocks", "num_queries", "num_keys", "num_rows"])
def count_picks_kernel(
    block_indices, counts, statistics, first, total, token_sequence, block_start, cu_q, cu_k, lengths,
    blocks, num_queries, num_keys, num_rows, G: tl.constexpr, GROUPS: tl.constexpr, N: tl.constexpr,
    SELECT: tl.constexpr, LAYOUT: tl.constexpr, SPREAD: tl.constexpr, PICKS: tl.constexpr,
):  # fmt: skip
    """Also says of parts that there will not be that they are empty."""
    pick, exists, chosen, segment, counter = _pick(
        block_indices, first, total, token_sequence, block_start, cu_q, cu_k, lengths, blocks, num_queries, num_keys,
        num_rows, GROUPS, N, SELECT, LAYOUT, SPREAD, PICKS,
    )  # fmt: skip
    tl.atomic_add(counts + segment * SPREAD + counter, 1, mask=chosen, sem="relaxed")
    for head in tl.static_range(G):
        tl.store(statistics + 2 * (pick.to(tl.int64) * G + head), float("-inf"), mask=exists & ~chosen)


@triton.jit(do_not_specialize=["segments"])
def segment_starts_kernel(
    counts, starts, ends, item_starts, totals, segments,
    SPREAD: tl.constexpr, PER_ITEM: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """Room for each list and for its work items; the counts become cursors into the lists."""
    segment = tl.program_id(0) * SEGMENTS + tl.arange(0, SEGMENTS)
    mask = segment < segments
    counter = (segment * SPREAD)[:, None] + tl.arange(0, SPREAD)[None, :]
    count = tl.load(counts + counter, mask=mask[:, None], other=0)
    length = tl.sum(count, 1)
    items = (length + (PER_ITEM - 1)) // PER_ITEM
    start = tl.atomic_add(totals, tl.sum(length, 0), sem="relaxed") + tl.cumsum(length, 0) - length
    item_start = tl.atomic_add(totals + 1, tl.sum(items, 0), sem="relaxed") + tl.cumsum(items, 0) - items
    tl.store(counts + counter, start[:, None] + tl.cumsum(count, 1) - count, mask=mask[:, None])
    tl.store(starts + segment, start, mask=mask)
    tl.store(ends + segment, start + length, mask=mask)
    tl.store(item_starts + segment, item_start, mask=mask)


@triton.jit(do_not_specialize=["first", "total", "blocks", "num_queries", "num_keys", "num_rows"])
def list_picks_kernel(
    block_indices, cursors, starts, item_starts, item_segments, listed, first, total, token_sequence, block_start,
    cu_q, cu_k, lengths, blocks, num_queries, num_keys, num_rows, GROUPS: tl.constexpr, N: tl.constexpr,
    SELECT: tl.constexpr, LAYOUT: tl.constexpr, SPREAD: tl.constexpr, PER_ITEM: tl.constexpr, PICKS: tl.constexpr,
):  # fmt: skip
    pick, _, chosen, segment, counter = _pick(
        block_indices, first, total, token_sequence, block_start, cu_q, cu_k, lengths, blocks, num_queries, num_keys,
        num_rows, GROUPS, N, SELECT, LAYOUT, SPREAD, PICKS,
    )  # fmt: skip
    place = tl.atomic_add(cursors + segment * SPREAD + counter, 1, mask=chosen, sem="relaxed")
    tl.store(listed + place, pick, mask=chosen)
    in_list = place - tl.load(starts + segment, mask=chosen, other=0)
    opens = chosen & (in_list % PER_ITEM == 0)
    item = tl.load(item_starts + segment, mask=opens, other=0) + in_list // PER_ITEM
    tl.store(item_segments + item, segment, mask=opens)


@triton.jit(do_not_specialize=["first", "blocks", "num_queries", "num_keys", "num_rows"])
def selected_parts_kernel(
    q, k, v, part_out, statistics, listed, starts, ends, item_starts, item_segments, totals, block_sequence,
    block_start, cu_q, cu_k, lengths, first, blocks, num_queries, num_keys, num_rows, scale_log2, strides,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DR: tl.constexpr,
    E: tl.constexpr, EP: tl.constexpr, GROUPS: tl.constexpr, N: tl.constexpr, SELECT: tl.constexpr,
    LAYOUT: tl.constexpr, PER_ITEM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kg, stride_vb, stride_vs, stride_vg = strides
    item = tl.program_id(0)
    if item >= tl.load(totals + 1):
        return
    segment = tl.load(item_segments + item)
    begin = tl.load(starts + segment) + (item - tl.load(item_starts + segment)) * PER_ITEM
    end = tl.minimum(begin + PER_ITEM, tl.load(ends + segment))
    is_inside = segment >= GROUPS * blocks
    group, row, block, q_start, t, k_start, s = keys_of(
        segment % (GROUPS * blocks), blocks, block_sequence, block_start, cu_q, cu_k, lengths,
        num_queries, num_keys, num_rows, LAYOUT,
    )  # fmt: skip
    in_block = tl.arange(0, BLOCK_N)
    keys = block * SELECT + in_block
    key_mask = (keys < s) & (in_block < SELECT)
    e = tl.arange(0, EP)
    k_base = (k_start + block * SELECT).to(tl.int64)
    k_rows = k + row.to(tl.int64) * stride_kb + k_base * stride_ks + group * stride_kg
    v_rows = v + row.to(tl.int64) * stride_vb + k_base * stride_vs + group * stride_vg
    k_tile = load_columns(columns(k_rows + in_block[:, None] * stride_ks, DP, DR), 0, key_mask, True, D, DP, DR)
    v_tile = load_rows(v_rows + in_block[:, None] * stride_vs + e[None, :], key_mask, e < E, True, E != EP)

    rows = tl.arange(0, BLOCK_Q * GP)
    query, head = rows // GP, rows % GP
    # Queries are counted over the batch in the lists, in their own row here; they are one for packed sequences.
    row_start = wide(row) * num_queries
    q_heads = q + row.to(tl.int64) * stride_qb + group * G * stride_qh + wide(head) * stride_qh
    q_heads = columns(q_heads[:, None], DP, DR)
    for start in tl.range(begin, end, BLOCK_Q):
        is_listed = start + query < end
        pick = tl.load(listed + start + query, mask=is_listed, other=0)
        flat = first + pick // (GROUPS * N)
        row_mask = is_listed & (head < G)
        q_tile = load_columns(q_heads, ((flat - row_start) * stride_qt)[:, None], row_mask, True, D, DP, DR)
        scores = dot_columns(q_tile, k_tile, DR, PRECISION)
        if SELECT != BLOCK_N:
            scores = tl.where((in_block < SELECT)[None, :], scores, float("-inf"))
        if is_inside:
            # Rows that are not listed see the first key too: no -inf - -inf.
            position = tl.where(is_listed, s - t + flat - q_start, block * SELECT)
            scores = tl.where(keys[None, :] <= position[:, None], scores, float("-inf"))
        top = tl.max(scores, 1) * scale_log2
        p = tl.exp2(scores * scale_log2 - top[:, None])
        total = tl.sum(p, 1)
        out = tl.dot(p.to(v_tile.dtype), v_tile, input_precision=PRECISION) * (1.0 / total)[:, None]
        part = pick.to(tl.int64) * G + head
        pair = statistics + (2 * part)[:, None] + tl.arange(0, 2)[None, :]
        tl.store(pair, tl.join(top, total), mask=row_mask[:, None])
        tl.store(
            part_out + (part * E)[:, None] + e[None, :],
            out.to(part_out.dtype.element_ty),
            mask=row_mask[:, None] & (e < E)[None, :],
        )


@triton.jit(do_not_specialize=["first", "num_rows"])
def merge_parts_kernel(
    part_out, statistics, out, lse, first, num_rows,
    G: tl.constexpr, GROUPS: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Rows are queries x heads, whose parts lie [query, KV head, slot, head of the group]."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = rows < num_rows
    part = (rows // G).to(tl.int64) * (N * G) + rows % G
    slot, e = tl.arange(0, NP), tl.arange(0, EP)
    at = statistics + 2 * (part[:, None] + (slot * G)[None, :])
    mask = exists[:, None] & (slot < N)[None, :]
    tops = tl.load(at, mask=mask, other=float("-inf"))
    totals = tl.load(at + 1, mask=mask, other=0.0)
    top = tl.max(tops, 1)
    is_empty = top == float("-inf")
    reference = tl.where(is_empty, 0.0, top)
    # Of parts that there are not, only the top was written.
    total = tl.sum(tl.where(tops == float("-inf"), 0.0, totals * tl.exp2(tops - reference[:, None])), 1)
    total = tl.where(is_empty, 1.0, total)
    acc = tl.zeros([ROWS, EP], tl.float32)
    for i in tl.static_range(N):
        # No load depends on another; the weights of a slot still go through shared memory (docs/kernels.md, Log).
        part_row = part + i * G
        part_o = tl.load(part_out + (part_row * E)[:, None] + e[None, :], mask=exists[:, None] & (e < E)[None, :])
        top_i = tl.load(statistics + 2 * part_row, mask=exists, other=float("-inf"))
        total_i = tl.load(statistics + 2 * part_row + 1, mask=exists, other=0.0)
        weight = total_i * tl.exp2(top_i - reference) / total
        acc += tl.where((top_i == float("-inf"))[:, None], 0.0, weight[:, None] * part_o)
    out_row = wide(first) * (GROUPS * G) + rows
    tl.store(lse + out_row, tl.where(is_empty, float("-inf"), (reference + tl.log2(total)) * LN2), mask=exists)
    tl.store(
        out + (out_row * E)[:, None] + e[None, :],
        acc.to(out.dtype.element_ty),
        mask=exists[:, None] & (e < E)[None, :],
    )


def tile_of(heads: Heads, q: Tensor, config: NSAConfig) -> TileSize:
    """A block of keys is one tile."""
    return tile_for("selected_parts", heads, q, config.select_block_size)


def selected_forward_by_block(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, out: Tensor, lse: Tensor,
    layout: Layout, config: NSAConfig, scale: float,
) -> None:  # fmt: skip
    """Writes out [b, t, h, e] and lse [b, t, h]; queries that see nothing get 0 and -inf."""
    heads, tile = Heads.of(q, k, v), tile_of(Heads.of(q, k, v), q, config)
    select, device = config.select_block_size, q.device
    block_indices = block_indices.contiguous()
    n = block_indices.shape[3]
    token_sequence = block_sequence = block_start = None
    blocks = layout.b * config.num_selection_blocks(layout.s)
    if layout.kind == PACKED:
        block_map = layout.key_tiles(layout.s, select)
        blocks, block_sequence, block_start = block_map.count, block_map.sequence, block_map.first
        token_sequence = layout.query_tiles(1).sequence
    segments = 2 * heads.g * blocks
    spread = min(16, max(1, COUNTERS // next_power_of_2(segments)))
    queries = layout.b * layout.t
    passes = cdiv(queries * n * heads.h * (heads.e * q.element_size() + 8), PARTS_BYTES)
    at_once = cdiv(queries, min(passes, queries))
    picks_at_once = at_once * heads.g * n
    per_item = max(tile.block_q, ITEM_ROWS // heads.padded_group)
    items = cdiv(picks_at_once, per_item) + min(segments, picks_at_once)

    part_out = torch.empty(picks_at_once * heads.per_group, heads.e, dtype=q.dtype, device=device)
    statistics = torch.empty(picks_at_once * heads.per_group, 2, dtype=torch.float32, device=device)
    listed = torch.empty(picks_at_once, dtype=torch.int32, device=device)
    starts, ends, item_starts = (torch.empty(segments, dtype=torch.int32, device=device) for _ in range(3))
    item_segments = torch.empty(items, dtype=torch.int32, device=device)
    sizes = (layout.t, layout.s, layout.b)
    lengths = (layout.cu_q, layout.cu_k, layout.lengths)
    shape = {"GROUPS": heads.g, "N": n}
    common = {**shape, "SELECT": select, "LAYOUT": layout.kind}
    listing = {**common, "SPREAD": spread, "PICKS": PICKS}
    for first in range(0, queries, at_once):
        rows = min(at_once, queries - first)
        picks = rows * heads.g * n
        counters = torch.zeros(2 + segments * spread, dtype=torch.int32, device=device)
        counts, totals = counters[:-2], counters[-2:]
        where = (first, picks, token_sequence, block_start, *lengths, blocks, *sizes)
        programs = (cdiv(picks, PICKS),)
        start_kernel(
            count_picks_kernel, programs, block_indices, counts, statistics, *where, G=heads.per_group, **listing,
            num_warps=4,
        )  # fmt: skip
        start_kernel(
            segment_starts_kernel, (cdiv(segments, SEGMENTS),),
            counts, starts, ends, item_starts, totals, segments,
            SPREAD=spread, PER_ITEM=per_item, SEGMENTS=SEGMENTS, num_warps=4,
        )  # fmt: skip
        start_kernel(
            list_picks_kernel, programs,
            block_indices, counts, starts, item_starts, item_segments, listed, *where,
            **listing, PER_ITEM=per_item, num_warps=4,
        )  # fmt: skip
        start_kernel(
            selected_parts_kernel, (cdiv(picks, per_item) + min(segments, picks),),
            q, k, v, part_out, statistics, listed, starts, ends, item_starts, item_segments, totals,
            block_sequence, block_start, *lengths, first, blocks, *sizes, scale * 1.4426950408889634,
            strides_of(q, k, v),
            **heads.constants, **common, PER_ITEM=per_item, **tile.constants,
        )  # fmt: skip
        start_kernel(
            merge_parts_kernel, (cdiv(rows * heads.h, MERGE_ROWS),),
            part_out, statistics, out, lse, first, rows * heads.h, G=heads.per_group, **shape,
            NP=next_power_of_2(n), E=heads.e, EP=heads.padded_e, ROWS=MERGE_ROWS, num_warps=4,
        )  # fmt: skip
