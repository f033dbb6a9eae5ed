"""Gradients of attention over one contiguous range of keys: dq by query tiles, dk and dv by key tiles.

Both recompute the probabilities from the log-sum-exp, and neither adds atomically, so gradients repeat bit by bit. A
key tile may be seen by every query after it: its queries are split over several programs, whose sums (fp32) are added
afterwards in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.kernels.integers import cdiv
from nsa.kernels.launch import Heads, empty, tile_for
from nsa.kernels.layout import Layout
from nsa.kernels.split_sums import sum_splits
from nsa.kernels.start import start_kernel, strides_of
from nsa.kernels.tiles import (
    add_product,
    columns,
    dot_columns,
    keep_rows,
    keys_seen,
    load_columns,
    load_log2_lse,
    load_rows,
    locate,
    log2_lse,
    store_columns,
    wide,
    zero_columns,
)

# Programs to aim at, so that the longest of them do not decide alone, and the most splits worth their fp32 sums.
PROGRAMS = 2048
MAX_SPLITS = 16


@triton.jit
def _dq_range(
    dq, q, d_out, lse, delta, k_rows, v_rows, stride_ks, stride_vs, low_key, high_key, low, high, v_columns,
    scale_log2, MASKED: tl.constexpr, HAS_WINDOW: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DR: tl.constexpr,
    MASK_E: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    offsets = tl.arange(0, BLOCK_N)
    for start in tl.range(low_key, high_key, BLOCK_N):
        keys = start + offsets
        base = wide(start)
        k = load_columns(k_rows, base * stride_ks, keys < high_key, MASKED, D, DP, DR)
        v = load_rows(v_rows + base * stride_vs, keys < high_key, v_columns, MASKED, MASK_E)
        scores = dot_columns(q, k, DR, PRECISION)
        d_p = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
        p = tl.exp2(scores * scale_log2 - lse[:, None])
        d_s = p * (d_p - delta[:, None])
        if MASKED:
            visible = keys[None, :] < high[:, None]
            if HAS_WINDOW:
                visible &= keys[None, :] >= low[:, None]
            d_s = tl.where(visible, d_s, 0.0)  # not only p: 0 times NaN
        dq = add_product(dq, d_s, k, DR, PRECISION)
    return dq


@triton.jit(do_not_specialize=["num_queries", "num_keys", "window"])
def contiguous_dq_kernel(
    q, k, v, d_out, lse, delta, dq, cu_q, cu_k, key_start, lengths, tile_sequence, tile_first, num_queries, num_keys,
    window, scale, strides,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DR: tl.constexpr,
    E: tl.constexpr, EP: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr, HAS_WINDOW: tl.constexpr,
    LAYOUT: tl.constexpr, ADD: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    (stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kg, stride_vb, stride_vs, stride_vg, stride_ob,
     stride_ot, stride_oh) = strides  # fmt: skip
    group, row = wide(tl.program_id(1)), tl.program_id(2)
    pid = tl.program_id(0)
    if LAYOUT != 1:
        pid = tl.num_programs(0) - 1 - pid
    tile, q_start, t, s, k_start = locate(
        pid, row, cu_q, cu_k, key_start, lengths, tile_sequence, tile_first, num_queries, num_keys, LAYOUT
    )
    first = tile * BLOCK_Q
    if first >= t:
        return
    last = tl.minimum(first + BLOCK_Q, t) - 1
    rows = tl.arange(0, BLOCK_Q * GP)
    column = first + rows // GP
    head = rows % GP
    row_mask = (column < t) & (head < G)
    high = tl.where(column < t, keys_seen(s - t + column, BLOCK, STRIDE), 0)
    low = tl.maximum(high - window, 0)
    e = tl.arange(0, EP)
    heads = tl.num_programs(1) * G

    q_rows = row.to(tl.int64) * stride_qb + (q_start + first).to(tl.int64) * stride_qt + group * G * stride_qh
    q_in_tile = (rows // GP) * stride_qt + wide(head) * stride_qh
    queries = load_columns(columns(q + q_rows + q_in_tile[:, None], DP, DR), 0, row_mask, True, D, DP, DR)
    o_rows = row.to(tl.int64) * stride_ob + (q_start + first).to(tl.int64) * stride_ot + group * G * stride_oh
    o_in_tile = (rows // GP) * stride_ot + wide(head) * stride_oh
    d_outs = load_rows(d_out + o_rows + o_in_tile[:, None] + e[None, :], row_mask, e < E, True, E != EP)
    flat_rows = (row.to(tl.int64) * num_queries + q_start + first) * heads + group * G
    in_tile = (rows // GP) * heads + head
    row_lse = load_log2_lse(lse + flat_rows + in_tile, row_mask)
    row_delta = tl.load(delta + flat_rows + in_tile, mask=row_mask, other=0.0)

    offsets = tl.arange(0, BLOCK_N)
    k_rows = k + row.to(tl.int64) * stride_kb + k_start.to(tl.int64) * stride_ks + group * stride_kg
    v_rows = v + row.to(tl.int64) * stride_vb + k_start.to(tl.int64) * stride_vs + group * stride_vg
    k_rows = columns(k_rows + offsets[:, None] * stride_ks, DP, DR)
    v_rows = v_rows + offsets[:, None] * stride_vs + e[None, :]
    scale_log2 = scale * 1.4426950408889634

    acc = zero_columns(BLOCK_Q * GP, DP, DR)
    high_first = keys_seen(s - t + first, BLOCK, STRIDE)
    high_last = keys_seen(s - t + last, BLOCK, STRIDE)
    start = high_first * 0
    if HAS_WINDOW:
        start = tl.maximum(high_first - window, 0)
        low_last = tl.maximum(high_last - window, 0)
        begin = start + tl.cdiv(low_last - start, BLOCK_N) * BLOCK_N
        acc = _dq_range(
            acc, queries, d_outs, row_lse, row_delta, k_rows, v_rows, stride_ks, stride_vs,
            start, tl.minimum(begin, high_last), low, high, e < E, scale_log2,
            True, True, D, DP, DR, E != EP, BLOCK_N, PRECISION,
        )  # fmt: skip
        start = tl.minimum(begin, high_last)
    end = start + tl.maximum(high_first - start, 0) // BLOCK_N * BLOCK_N
    acc = _dq_range(
        acc, queries, d_outs, row_lse, row_delta, k_rows, v_rows, stride_ks, stride_vs, start, end,
        low, high, e < E, scale_log2, False, False, D, DP, DR, E != EP, BLOCK_N, PRECISION,
    )  # fmt: skip
    acc = _dq_range(
        acc, queries, d_outs, row_lse, row_delta, k_rows, v_rows, stride_ks, stride_vs, end, high_last,
        low, high, e < E, scale_log2, True, HAS_WINDOW, D, DP, DR, E != EP, BLOCK_N, PRECISION,
    )  # fmt: skip
    dq_rows = columns(dq + flat_rows * D + (in_tile * D)[:, None], DP, DR)
    store_columns(dq_rows, acc, scale, row_mask, D, DP, DR, ADD)


@triton.jit
def _load_statistics(lse, delta, first, end, num_heads, query, head, G: tl.constexpr):
    """lse (natural) and delta of the rows of a tile; -inf and 0 for those that do not exist."""
    mask = (first + query < end) & (head < G)
    at = wide(first) * num_heads + query * num_heads + head
    return tl.load(lse + at, mask=mask, other=float("-inf")), tl.load(delta + at, mask=mask, other=0.0)


@triton.jit
def _dkdv_range(
    dk, dv, k, v, keys, q, d_out, lse, delta, first_column, end_column, position, window, num_heads,
    stride_qt, stride_qh, stride_ot, stride_oh, scale_log2,
    MASKED: tl.constexpr, HAS_WINDOW: tl.constexpr, G: tl.constexpr, GP: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, DR: tl.constexpr,
    E: tl.constexpr, EP: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr, BLOCK_Q: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, BLOCK_Q * GP)
    query, head = rows // GP, rows % GP
    e = tl.arange(0, EP)
    q_tile = columns(q + (query * stride_qt + wide(head) * stride_qh)[:, None], DP, DR)
    o_tile = d_out + (query * stride_ot + wide(head) * stride_oh)[:, None] + e[None, :]
    next_lse, next_delta = _load_statistics(lse, delta, first_column, end_column, num_heads, query, head, G)
    for first in tl.range(first_column, end_column, BLOCK_Q):
        base = wide(first)
        row_mask = (first + query < end_column) & (head < G)
        # Only the masked loops may have a ragged end; whole heads are missing only where the group is padded.
        queries = load_columns(q_tile, base * stride_qt, row_mask, MASKED or G != GP, D, DP, DR)
        d_outs = load_rows(o_tile + base * stride_ot, row_mask, e < E, MASKED or G != GP, E != EP)
        # Loaded an iteration ahead: no product waits for them.
        row_lse, row_delta = next_lse, next_delta
        next_lse, next_delta = _load_statistics(lse, delta, first + BLOCK_Q, end_column, num_heads, query, head, G)
        scores = dot_columns(k, queries, DR, PRECISION)
        p = tl.exp2(scores * scale_log2 - log2_lse(row_lse)[None, :])
        if MASKED:
            high = keys_seen(position + first + query, BLOCK, STRIDE)
            visible = keys[:, None] < high[None, :]
            if HAS_WINDOW:
                visible &= keys[:, None] >= (high - window)[None, :]
            p = tl.where(visible, p, 0.0)
        dv = tl.dot(p.to(d_outs.dtype), d_outs, dv, input_precision=PRECISION)
        d_p = tl.dot(v, tl.trans(d_outs), input_precision=PRECISION)
        d_s = p * (d_p - row_delta[None, :])
        dk = add_product(dk, d_s, queries, DR, PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["num_queries", "num_keys", "window", "key_rows", "splits", "split_stride"])
def contiguous_dkdv_kernel(
    q, k, v, d_out, lse, delta, dk, dv, cu_q, cu_k, key_start, lengths, tile_sequence, tile_first,
    num_queries, num_keys, window, key_rows, splits, split_stride, scale, strides,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DR: tl.constexpr,
    E: tl.constexpr, EP: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr, HAS_WINDOW: tl.constexpr,
    LAYOUT: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    (stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kg, stride_vb, stride_vs, stride_vg, stride_ob,
     stride_ot, stride_oh) = strides  # fmt: skip
    group = wide(tl.program_id(1))
    row, split = tl.program_id(2) // splits, tl.program_id(2) % splits
    tile, q_start, t, s, k_start = locate(
        tl.program_id(0), row, cu_q, cu_k, key_start, lengths, tile_sequence, tile_first,
        num_queries, num_keys, LAYOUT,
    )  # fmt: skip
    num_visible = keys_seen(s - 1, BLOCK, STRIDE)
    # Keys to write: a ragged row's are written past its length too, as zeros.
    to_write = num_visible if LAYOUT == 1 else key_rows
    first_key = tile * BLOCK_N
    if first_key >= to_write:
        return
    keys = first_key + tl.arange(0, BLOCK_N)
    last_key = tl.minimum(first_key + BLOCK_N, num_visible) - 1
    e = tl.arange(0, EP)
    k_base = (k_start + first_key).to(tl.int64)
    offsets = tl.arange(0, BLOCK_N)
    k_rows = k + row.to(tl.int64) * stride_kb + k_base * stride_ks + group * stride_kg
    v_rows = v + row.to(tl.int64) * stride_vb + k_base * stride_vs + group * stride_vg
    key_mask = keys < num_visible
    k_tile = load_columns(columns(k_rows + offsets[:, None] * stride_ks, DP, DR), 0, key_mask, True, D, DP, DR)
    v_tile = load_rows(v_rows + offsets[:, None] * stride_vs + e[None, :], key_mask, e < E, True, E != EP)

    # Query columns that see any key of the tile, then this program's share of them.
    position = s - t
    first_column = tl.maximum(first_key * STRIDE + BLOCK - 1 - position, 0)
    end_column = t
    if HAS_WINDOW:
        end_column = tl.minimum(last_key + window - position, t)
    share = tl.cdiv(tl.cdiv(tl.maximum(end_column - first_column, 0), BLOCK_Q), splits) * BLOCK_Q
    first_column += split * share
    end_column = tl.minimum(first_column + share, end_column)
    if first_key >= num_visible:
        end_column = first_column
    # Columns that see every key of the tile: no mask.
    begin = tl.maximum(last_key * STRIDE + BLOCK - 1 - position, first_column)
    begin = tl.minimum(first_column + tl.cdiv(begin - first_column, BLOCK_Q) * BLOCK_Q, end_column)
    until = end_column
    if HAS_WINDOW:
        until = tl.minimum(first_key + window - position, end_column)
    until = begin + tl.maximum(until - begin, 0) // BLOCK_Q * BLOCK_Q

    heads = tl.num_programs(1) * G
    q_rows = q + row.to(tl.int64) * stride_qb + q_start.to(tl.int64) * stride_qt + group * G * stride_qh
    o_rows = d_out + row.to(tl.int64) * stride_ob + q_start.to(tl.int64) * stride_ot + group * G * stride_oh
    flat_rows = (row.to(tl.int64) * num_queries + q_start) * heads + group * G
    scale_log2 = scale * 1.4426950408889634
    dk_sum = zero_columns(BLOCK_N, DP, DR)
    dv_sum = tl.zeros([BLOCK_N, EP], tl.float32)
    dk_sum, dv_sum = _dkdv_range(
        dk_sum, dv_sum, k_tile, v_tile, keys, q_rows, o_rows, lse + flat_rows, delta + flat_rows,
        first_column, begin, position, window, heads, stride_qt, stride_qh, stride_ot, stride_oh, scale_log2,
        True, HAS_WINDOW, G, GP, D, DP, DR, E, EP, BLOCK, STRIDE, BLOCK_Q, PRECISION,
    )  # fmt: skip
    dk_sum, dv_sum = _dkdv_range(
        dk_sum, dv_sum, k_tile, v_tile, keys, q_rows, o_rows, lse + flat_rows, delta + flat_rows,
        begin, until, position, window, heads, stride_qt, stride_qh, stride_ot, stride_oh, scale_log2,
        False, False, G, GP, D, DP, DR, E, EP, BLOCK, STRIDE, BLOCK_Q, PRECISION,
    )  # fmt: skip
    dk_sum, dv_sum = _dkdv_range(
        dk_sum, dv_sum, k_tile, v_tile, keys, q_rows, o_rows, lse + flat_rows, delta + flat_rows,
        until, end_column, position, window, heads, stride_qt, stride_qh, stride_ot, stride_oh, scale_log2,
        True, HAS_WINDOW, G, GP, D, DP, DR, E, EP, BLOCK, STRIDE, BLOCK_Q, PRECISION,
    )  # fmt: skip

    # The loop without a mask gave keys past a ragged row's length, loaded as zeros, the probability exp(-lse).
    dk_sum = keep_rows(dk_sum, key_mask, DR)
    dv_sum = tl.where(key_mask[:, None], dv_sum, 0.0)
    groups = tl.num_programs(1)
    out_rows = split.to(tl.int64) * split_stride + (row.to(tl.int64) * key_rows + k_base) * groups + group
    write = keys < to_write
    dk_rows = columns(dk + out_rows * D + (offsets * groups * D)[:, None], DP, DR)
    dv_rows = dv + out_rows * E + (offsets * groups * E)[:, None] + e[None, :]
    store_columns(dk_rows, dk_sum, scale, write, D, DP, DR)
    tl.store(dv_rows, dv_sum.to(dv.dtype.element_ty), mask=write[:, None] & (e < E)[None, :])


def contiguous_backward(
    q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, lse: Tensor, delta: Tensor,
    layout: Layout, window: int | None, scale: float, add_to: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq (added to `add_to` where given), dk, dv; delta is rowsum(d_out * out) - d_lse, [b, t, h] in fp32 as lse."""
    arguments = (q, k, v, d_out, lse, delta, layout, window, scale)
    return contiguous_dq(*arguments, add_to), *contiguous_dkdv(*arguments)


def contiguous_dq(
    q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, lse: Tensor, delta: Tensor,
    layout: Layout, window: int | None, scale: float, add_to: Tensor | None = None,
) -> Tensor:  # fmt: skip
    heads = Heads.of(q, k, v)
    if q.numel() == 0 or k.shape[1] == 0:
        return q.new_zeros(q.shape) if add_to is None else add_to
    dq = empty(layout, q.shape, q.dtype, q.device) if add_to is None else add_to
    tile = tile_for("contiguous_dq" if window is None else "window_dq", heads, q)
    tiles = layout.query_tiles(tile.block_q)
    start_kernel(
        contiguous_dq_kernel, (tiles.count, heads.g, layout.b),
        q, k, v, d_out, lse, delta, dq, *layout.arguments, tiles.sequence, tiles.first, layout.t, layout.s,
        window or 0, scale, strides_of(q, k, v, d_out), **_constants(heads, layout, window),
        ADD=add_to is not None, **tile.constants,
    )  # fmt: skip
    return dq


def contiguous_dkdv(
    q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, lse: Tensor, delta: Tensor,
    layout: Layout, window: int | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    heads = Heads.of(q, k, v)
    key_rows = k.shape[1]
    if q.numel() == 0 or key_rows == 0:
        return k.new_zeros(k.shape), v.new_zeros(v.shape)
    tile = tile_for("contiguous_dkdv" if window is None else "window_dkdv", heads, q)
    tiles = layout.key_tiles(key_rows, tile.block_n)
    splits = 1
    if window is None:
        programs = tiles.count * heads.g * layout.b
        splits = max(1, min(MAX_SPLITS, cdiv(PROGRAMS, programs), cdiv(layout.t, 512)))
    many = splits > 1
    dk, dv = (
        empty(
            layout,
            (splits, *x.shape) if many else x.shape,
            torch.float32 if many else x.dtype,
            x.device,
        )
        for x in (k, v)
    )
    start_kernel(
        contiguous_dkdv_kernel, (tiles.count, heads.g, layout.b * splits),
        q, k, v, d_out, lse, delta, dk, dv, *layout.arguments, tiles.sequence, tiles.first, layout.t, layout.s,
        window or 0, key_rows, splits, layout.b * key_rows * heads.g, scale, strides_of(q, k, v, d_out),
        **_constants(heads, layout, window), **tile.constants,
    )  # fmt: skip
    return sum_splits(dk, dv, k, v) if many else (dk, dv)


def _constants(heads: Heads, layout: Layout, window: int | None) -> dict[str, int]:
    return {
        **heads.constants, "BLOCK": layout.block, "STRIDE": layout.stride,
        "HAS_WINDOW": window is not None, "LAYOUT": layout.kind,
    }  # fmt: skip
