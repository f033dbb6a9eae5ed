"""Attention of each query over one contiguous range of keys: compressed, window and dense are this kernel.

Grid (query tiles, KV heads, rows of the batch). A tile is BLOCK_Q queries x GROUP heads (padded to a power of two) and
runs over the keys its queries see in at most three loops: only the first and the last test a mask.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.kernels import hopper
from nsa.kernels.launch import Heads, empty, tile_for
from nsa.kernels.layout import Layout
from nsa.kernels.start import start_kernel
from nsa.kernels.tiles import (
    columns,
    dot_columns,
    keys_seen,
    load_columns,
    load_rows,
    locate,
    softmax_end,
    softmax_step,
    wide,
)


@triton.jit
def _range(
    acc, total, top, q, k_rows, v_rows, stride_ks, stride_vs, low_key, high_key, low, high, v_columns,
    scale_log2, MASKED: tl.constexpr, HAS_WINDOW: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DR: tl.constexpr,
    MASK_E: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    offsets = tl.arange(0, BLOCK_N)
    for start in tl.range(low_key, high_key, BLOCK_N):
        keys = start + offsets
        base = wide(start)
        k = load_columns(k_rows, base * stride_ks, keys < high_key, MASKED, D, DP, DR)
        scores = dot_columns(q, k, DR, PRECISION)
        if MASKED:
            visible = keys[None, :] < high[:, None]
            if HAS_WINDOW:
                visible &= keys[None, :] >= low[:, None]
            scores = tl.where(visible, scores, float("-inf"))
        v = load_rows(v_rows + base * stride_vs, keys < high_key, v_columns, MASKED, MASK_E)
        acc, total, top = softmax_step(acc, total, top, scores, scale_log2, v, MASKED, PRECISION)
    return acc, total, top


@triton.jit(do_not_specialize=["num_queries", "num_keys", "window"])
def contiguous_forward_kernel(
    q, k, v, out, lse, cu_q, cu_k, key_start, lengths, tile_sequence, tile_first, num_queries, num_keys, window,
    scale_log2, stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kg, stride_vb, stride_vs, stride_vg,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DR: tl.constexpr,
    E: tl.constexpr, EP: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr, HAS_WINDOW: tl.constexpr,
    LAYOUT: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    group, row = wide(tl.program_id(1)), tl.program_id(2)
    pid = tl.program_id(0)
    if LAYOUT != 1:
        pid = tl.num_programs(0) - 1 - pid  # the longest ranges first
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

    query_rows = row.to(tl.int64) * stride_qb + (q_start + first).to(tl.int64) * stride_qt + group * G * stride_qh
    in_tile = (rows // GP) * stride_qt + wide(head) * stride_qh
    queries = load_columns(columns(q + query_rows + in_tile[:, None], DP, DR), 0, row_mask, True, D, DP, DR)
    offsets = tl.arange(0, BLOCK_N)
    k_rows = k + row.to(tl.int64) * stride_kb + k_start.to(tl.int64) * stride_ks + group * stride_kg
    v_rows = v + row.to(tl.int64) * stride_vb + k_start.to(tl.int64) * stride_vs + group * stride_vg
    k_rows = columns(k_rows + offsets[:, None] * stride_ks, DP, DR)
    v_rows = v_rows + offsets[:, None] * stride_vs + e[None, :]

    acc = tl.zeros([BLOCK_Q * GP, EP], tl.float32)
    total = tl.zeros([BLOCK_Q * GP], tl.float32)
    top = tl.full([BLOCK_Q * GP], float("-inf"), tl.float32)
    high_first = keys_seen(s - t + first, BLOCK, STRIDE)
    high_last = keys_seen(s - t + last, BLOCK, STRIDE)
    start = high_first * 0
    if HAS_WINDOW:
        start = tl.maximum(high_first - window, 0)
        low_last = tl.maximum(high_last - window, 0)
        begin = start + tl.cdiv(low_last - start, BLOCK_N) * BLOCK_N
        acc, total, top = _range(
            acc, total, top, queries, k_rows, v_rows, stride_ks, stride_vs, start, tl.minimum(begin, high_last),
            low, high, e < E, scale_log2, True, True, D, DP, DR, E != EP, BLOCK_N, PRECISION,
        )  # fmt: skip
        start = tl.minimum(begin, high_last)
    end = start + tl.maximum(high_first - start, 0) // BLOCK_N * BLOCK_N
    acc, total, top = _range(
        acc, total, top, queries, k_rows, v_rows, stride_ks, stride_vs, start, end,
        low, high, e < E, scale_log2, False, False, D, DP, DR, E != EP, BLOCK_N, PRECISION,
    )  # fmt: skip
    acc, total, top = _range(
        acc, total, top, queries, k_rows, v_rows, stride_ks, stride_vs, end, high_last,
        low, high, e < E, scale_log2, True, HAS_WINDOW, D, DP, DR, E != EP, BLOCK_N, PRECISION,
    )  # fmt: skip

    result, row_lse = softmax_end(acc, total, top)
    heads = tl.num_programs(1) * G
    out_rows = (row.to(tl.int64) * num_queries + q_start + first) * heads + group * G
    in_tile = (rows // GP) * heads + head
    tl.store(lse + out_rows + in_tile, row_lse, mask=row_mask)
    tl.store(
        out + out_rows * E + (in_tile * E)[:, None] + e[None, :],
        result.to(out.dtype.element_ty),
        mask=row_mask[:, None] & (e < E)[None, :],
    )


def contiguous_forward(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """out [b, t, h, e] and lse [b, t, h] (fp32) over the keys of `layout`, or the last `window` of them."""
    heads = Heads.of(q, k, v)
    out = empty(layout, (*q.shape[:3], heads.e), q.dtype, q.device)
    lse = empty(layout, q.shape[:3], torch.float32, q.device, fill=float("-inf"))
    if out.numel() == 0:
        return out, lse.fill_(float("-inf"))
    if window is None and hopper.serves_compressed(q, k, v, heads):
        hopper.compressed_forward(q, k, v, out, lse, layout, heads, scale)
        return out, lse
    tile = tile_for("contiguous_forward" if window is None else "window_forward", heads, q)
    tiles = layout.query_tiles(tile.block_q)
    start_kernel(
        contiguous_forward_kernel, (tiles.count, heads.g, layout.b),
        q, k, v, out, lse, *layout.arguments, tiles.sequence, tiles.first, layout.t, layout.s,
        window or 0, scale * 1.4426950408889634, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        **heads.constants, BLOCK=layout.block, STRIDE=layout.stride, HAS_WINDOW=window is not None,
        LAYOUT=layout.kind, **tile.constants,
    )  # fmt: skip
    return out, lse
