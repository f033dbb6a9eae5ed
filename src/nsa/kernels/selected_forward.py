"""Attention over the selected blocks, and dq: a tile of neighbouring queries against the union of their blocks.

Grid (query tiles, KV heads, rows). Rows are BLOCK_Q queries x GROUP heads; a block of keys (in steps of BLOCK_N) is
loaded once for the tile, and the bit of each query says whether it attends. The forward of groups of few heads is that
of selected_by_block.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.config import NSAConfig
from nsa.kernels import hopper
from nsa.kernels import selected_by_block as by_block
from nsa.kernels.launch import Heads, TileSize, empty, tile_for
from nsa.kernels.layout import Layout
from nsa.kernels.start import start_kernel, strides_of
from nsa.kernels.tiles import (
    add_product,
    columns,
    dot_columns,
    load_columns,
    load_log2_lse,
    load_rows,
    locate,
    softmax_end,
    softmax_step,
    softmax_step_rows,
    store_columns,
    wide,
    zero_columns,
)
from nsa.kernels.unions import unions

# A bit for each query of a tile, the sign left alone.
MAX_QUERIES = 16


@triton.jit
def _forward_range(
    acc, total, top, q, k_rows, v_rows, stride_ks, stride_vs, items, first, end, query, position, s,
    v_columns, scale_log2, MASKED: tl.constexpr, SELECT: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    DR: tl.constexpr, MASK_E: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The blocks items[first:end]; not masked, they lie before every query, so a row sees a whole block or nothing."""
    STEPS: tl.constexpr = (SELECT + BLOCK_N - 1) // BLOCK_N
    offsets = tl.arange(0, BLOCK_N)
    for step in tl.range(first * STEPS, end * STEPS):
        item = tl.load(items + step // STEPS)
        attends = (((item & 0x7FFFFFFF).to(tl.int32) >> query) & 1) > 0
        in_block = step % STEPS * BLOCK_N
        base = (item >> 32) * SELECT + in_block
        keys = base.to(tl.int32) + offsets
        key_mask = (keys < s) & (in_block + offsets < SELECT)
        k = load_columns(k_rows, base * stride_ks, key_mask, MASKED, D, DP, DR)
        scores = dot_columns(q, k, DR, PRECISION)
        v = load_rows(v_rows + base * stride_vs, key_mask, v_columns, MASKED, MASK_E)
        if MASKED:
            visible = (keys[None, :] <= position[:, None]) & attends[:, None]
            if SELECT % BLOCK_N != 0:
                visible &= (in_block + offsets < SELECT)[None, :]
            scores = tl.where(visible, scores, float("-inf"))
            acc, total, top = softmax_step(acc, total, top, scores, scale_log2, v, True, PRECISION)
        else:
            acc, total, top = softmax_step_rows(acc, total, top, scores, scale_log2, v, attends, PRECISION)
    return acc, total, top


@triton.jit
def _dq_range(
    acc, q, d_out, lse, delta, k_rows, v_rows, stride_ks, stride_vs, items, first, end, query, position, s,
    v_columns, scale_log2, MASKED: tl.constexpr, SELECT: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    DR: tl.constexpr, MASK_E: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    STEPS: tl.constexpr = (SELECT + BLOCK_N - 1) // BLOCK_N
    offsets = tl.arange(0, BLOCK_N)
    for step in tl.range(first * STEPS, end * STEPS):
        item = tl.load(items + step // STEPS)
        attends = (((item & 0x7FFFFFFF).to(tl.int32) >> query) & 1) > 0
        in_block = step % STEPS * BLOCK_N
        base = (item >> 32) * SELECT + in_block
        keys = base.to(tl.int32) + offsets
        key_mask = (keys < s) & (in_block + offsets < SELECT)
        k = load_columns(k_rows, base * stride_ks, key_mask, MASKED, D, DP, DR)
        v = load_rows(v_rows + base * stride_vs, key_mask, v_columns, MASKED, MASK_E)
        scores = dot_columns(q, k, DR, PRECISION)
        d_p = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
        p = tl.exp2(scores * scale_log2 - tl.where(attends, lse, float("inf"))[:, None])
        d_s = p * (d_p - delta[:, None])
        if MASKED:
            visible = keys[None, :] <= position[:, None]
            if SELECT % BLOCK_N != 0:
                visible &= (in_block + offsets < SELECT)[None, :]
            d_s = tl.where(visible, d_s, 0.0)  # not only p: 0 times NaN
        acc = add_product(acc, d_s, k, DR, PRECISION)
    return acc


@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def selected_forward_kernel(
    q, k, v, items, counts, out, lse, cu_q, cu_k, key_start, lengths, tile_sequence, tile_first, num_queries, num_keys,
    scale_log2, stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kg, stride_vb, stride_vs, stride_vg,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DR: tl.constexpr,
    E: tl.constexpr, EP: tl.constexpr, SELECT: tl.constexpr, N: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid, group, row = tl.program_id(0), wide(tl.program_id(1)), tl.program_id(2)
    tile, q_start, t, s, k_start = locate(
        pid, row, cu_q, cu_k, key_start, lengths, tile_sequence, tile_first, num_queries, num_keys, LAYOUT
    )
    first = tile * BLOCK_Q
    if first >= t:
        return
    rows = tl.arange(0, BLOCK_Q * GP)
    query, head = rows // GP, rows % GP
    column = first + query
    row_mask = (column < t) & (head < G)
    position = tl.where(column < t, s - t + column, -1)
    e = tl.arange(0, EP)
    q_rows = row.to(tl.int64) * stride_qb + (q_start + first).to(tl.int64) * stride_qt + group * G * stride_qh
    q_in_tile = query * stride_qt + wide(head) * stride_qh
    is_token = row_mask & (position >= 0)  # what padding holds is not looked at
    queries = load_columns(columns(q + q_rows + q_in_tile[:, None], DP, DR), 0, is_token, True, D, DP, DR)
    offsets = tl.arange(0, BLOCK_N)
    k_rows = k + row.to(tl.int64) * stride_kb + k_start.to(tl.int64) * stride_ks + group * stride_kg
    v_rows = v + row.to(tl.int64) * stride_vb + k_start.to(tl.int64) * stride_vs + group * stride_vg
    k_rows = columns(k_rows + offsets[:, None] * stride_ks, DP, DR)
    v_rows = v_rows + offsets[:, None] * stride_vs + e[None, :]
    out_tile = (row.to(tl.int64) * tl.num_programs(0) + pid) * tl.num_programs(1) + group
    tile_items = items + out_tile * (BLOCK_Q * N)
    num_past, num_items = tl.load(counts + 2 * out_tile), tl.load(counts + 2 * out_tile + 1)
    RAGGED_BLOCK: tl.constexpr = SELECT % BLOCK_N != 0

    acc = tl.zeros([BLOCK_Q * GP, EP], tl.float32)
    total = tl.zeros([BLOCK_Q * GP], tl.float32)
    top = tl.full([BLOCK_Q * GP], float("-inf"), tl.float32)
    acc, total, top = _forward_range(
        acc, total, top, queries, k_rows, v_rows, stride_ks, stride_vs, tile_items, 0, num_past, query, position, s,
        e < E, scale_log2, RAGGED_BLOCK, SELECT, D, DP, DR, E != EP, BLOCK_N, PRECISION,
    )  # fmt: skip
    acc, total, top = _forward_range(
        acc, total, top, queries, k_rows, v_rows, stride_ks, stride_vs, tile_items, num_past, num_items, query,
        position, s, e < E, scale_log2, True, SELECT, D, DP, DR, E != EP, BLOCK_N, PRECISION,
    )  # fmt: skip

    result, row_lse = softmax_end(acc, total, top)
    heads = tl.num_programs(1) * G
    out_rows = (row.to(tl.int64) * num_queries + q_start + first) * heads + group * G
    in_tile = query * heads + head
    tl.store(lse + out_rows + in_tile, row_lse, mask=row_mask)
    tl.store(
        out + out_rows * E + (in_tile * E)[:, None] + e[None, :],
        result.to(out.dtype.element_ty),
        mask=row_mask[:, None] & (e < E)[None, :],
    )


@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def selected_dq_kernel(
    q, k, v, d_out, lse, delta, dq, items, counts, cu_q, cu_k, key_start, lengths, tile_sequence, tile_first,
    num_queries, num_keys, scale, strides,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DR: tl.constexpr,
    E: tl.constexpr, EP: tl.constexpr, SELECT: tl.constexpr, N: tl.constexpr, LAYOUT: tl.constexpr, ADD: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    (stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kg, stride_vb, stride_vs, stride_vg, stride_ob,
     stride_ot, stride_oh) = strides  # fmt: skip
    pid, group, row = tl.program_id(0), wide(tl.program_id(1)), tl.program_id(2)
    tile, q_start, t, s, k_start = locate(
        pid, row, cu_q, cu_k, key_start, lengths, tile_sequence, tile_first, num_queries, num_keys, LAYOUT
    )
    first = tile * BLOCK_Q
    if first >= t:
        return
    rows = tl.arange(0, BLOCK_Q * GP)
    query, head = rows // GP, rows % GP
    column = first + query
    row_mask = (column < t) & (head < G)
    position = tl.where(column < t, s - t + column, -1)
    e = tl.arange(0, EP)
    q_rows = row.to(tl.int64) * stride_qb + (q_start + first).to(tl.int64) * stride_qt + group * G * stride_qh
    q_in_tile = query * stride_qt + wide(head) * stride_qh
    is_token = row_mask & (position >= 0)  # what padding holds is not looked at
    queries = load_columns(columns(q + q_rows + q_in_tile[:, None], DP, DR), 0, is_token, True, D, DP, DR)
    o_rows = row.to(tl.int64) * stride_ob + (q_start + first).to(tl.int64) * stride_ot + group * G * stride_oh
    o_in_tile = query * stride_ot + wide(head) * stride_oh
    d_outs = load_rows(d_out + o_rows + o_in_tile[:, None] + e[None, :], is_token, e < E, True, E != EP)
    heads = tl.num_programs(1) * G
    flat_rows = (row.to(tl.int64) * num_queries + q_start + first) * heads + group * G
    in_tile = query * heads + head
    row_lse = load_log2_lse(lse + flat_rows + in_tile, row_mask)
    row_delta = tl.load(delta + flat_rows + in_tile, mask=row_mask, other=0.0)
    offsets = tl.arange(0, BLOCK_N)
    k_rows = k + row.to(tl.int64) * stride_kb + k_start.to(tl.int64) * stride_ks + group * stride_kg
    v_rows = v + row.to(tl.int64) * stride_vb + k_start.to(tl.int64) * stride_vs + group * stride_vg
    k_rows = columns(k_rows + offsets[:, None] * stride_ks, DP, DR)
    v_rows = v_rows + offsets[:, None] * stride_vs + e[None, :]
    scale_log2 = scale * 1.4426950408889634
    out_tile = (row.to(tl.int64) * tl.num_programs(0) + pid) * tl.num_programs(1) + group
    tile_items = items + out_tile * (BLOCK_Q * N)
    num_past, num_items = tl.load(counts + 2 * out_tile), tl.load(counts + 2 * out_tile + 1)
    RAGGED_BLOCK: tl.constexpr = SELECT % BLOCK_N != 0

    acc = zero_columns(BLOCK_Q * GP, DP, DR)
    acc = _dq_range(
        acc, queries, d_outs, row_lse, row_delta, k_rows, v_rows, stride_ks, stride_vs, tile_items, 0, num_past, query,
        position, s, e < E, scale_log2, RAGGED_BLOCK, SELECT, D, DP, DR, E != EP, BLOCK_N, PRECISION,
    )  # fmt: skip
    acc = _dq_range(
        acc, queries, d_outs, row_lse, row_delta, k_rows, v_rows, stride_ks, stride_vs, tile_items, num_past, num_items,
        query, position, s, e < E, scale_log2, True, SELECT, D, DP, DR, E != EP, BLOCK_N, PRECISION,
    )  # fmt: skip
    dq_rows = columns(dq + flat_rows * D + (in_tile * D)[:, None], DP, DR)
    store_columns(dq_rows, acc, scale, row_mask, D, DP, DR, ADD)


def selected_forward(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, layout: Layout, config: NSAConfig, scale: float
) -> tuple[Tensor, Tensor]:
    """out [b, t, h, e] and lse [b, t, h] (fp32)."""
    heads = Heads.of(q, k, v)
    select, n = config.select_block_size, block_indices.shape[3]
    out = empty(layout, (*q.shape[:3], heads.e), q.dtype, q.device)
    lse = empty(layout, q.shape[:3], torch.float32, q.device, fill=float("-inf"))
    if out.numel() == 0 or k.shape[1] == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    if by_block.serves(q, heads, config):
        by_block.selected_forward_by_block(q, k, v, block_indices, out, lse, layout, config, scale)
        return out, lse
    on_hopper = hopper.serves_selected(q, k, v, heads, select)
    if on_hopper:
        tile = hopper.tile_of(hopper.ATTENTION, heads, heads.padded_group)
    else:
        tile = selected_tile("selected_forward", heads, q, config)
    tiles = layout.query_tiles(tile.block_q)
    items, counts = unions(block_indices, layout, tiles, tile.block_q, select)
    if on_hopper:
        hopper.selected_forward(q, k, v, items, counts, out, lse, layout, tiles, heads, select, n, scale)
        return out, lse
    start_kernel(
        selected_forward_kernel, (tiles.count, heads.g, layout.b),
        q, k, v, items, counts, out, lse, *layout.arguments, tiles.sequence, tiles.first, layout.t, layout.s,
        scale * 1.4426950408889634, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        **heads.constants, SELECT=select, N=n, LAYOUT=layout.kind,
        **tile.constants,
    )  # fmt: skip
    return out, lse


def selected_dq(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, d_out: Tensor, lse: Tensor, delta: Tensor,
    layout: Layout, config: NSAConfig, scale: float, add_to: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """dq, added to `add_to` where given."""
    heads = Heads.of(q, k, v)
    tile = selected_tile("selected_dq", heads, q, config)
    if q.numel() == 0 or k.shape[1] == 0:
        return q.new_zeros(q.shape) if add_to is None else add_to
    dq = empty(layout, q.shape, q.dtype, q.device) if add_to is None else add_to
    tiles = layout.query_tiles(tile.block_q)
    items, counts = unions(block_indices, layout, tiles, tile.block_q, config.select_block_size)
    start_kernel(
        selected_dq_kernel, (tiles.count, heads.g, layout.b),
        q, k, v, d_out, lse, delta, dq, items, counts, *layout.arguments, tiles.sequence, tiles.first,
        layout.t, layout.s, scale, strides_of(q, k, v, d_out),
        **heads.constants, SELECT=config.select_block_size, N=block_indices.shape[3], LAYOUT=layout.kind,
        ADD=add_to is not None, **tile.constants,
    )  # fmt: skip
    return dq


def selected_tile(kernel: str, heads: Heads, q: Tensor, config: NSAConfig) -> TileSize:
    """Few queries a tile, for their blocks differ; a matrix unit needs 16 rows, the fast ones 64."""
    tile = tile_for(kernel, heads, q, config.select_block_size)
    queries = min(tile.block_q, MAX_QUERIES, max(4, 16 // heads.padded_group))
    return tile.with_queries(queries)
