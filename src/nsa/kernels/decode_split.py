"""First launch of decoding: compressed and window keys in splits, the importance of blocks gathered in the same pass.

Grid (splits, KV heads, rows x query tiles). A program runs over one split of one row's keys for one tile of queries
x heads and leaves its un-normalised output, maximum and sum. K_cmp is read once: the exponentials that the output
needs are also summed by selection block. The program that finishes a row's compressed keys last selects its blocks
(decode_select.py); a counter in the cache says which one that is, and no sum depends on it.
"""

import triton
import triton.language as tl

from nsa.kernels.decode_select import merge_lse, select_blocks
from nsa.kernels.decode_tiles import (
    attend_tile,
    begin,
    compressed_plan,
    last_position,
    load_queries,
    page_of,
    window_plan,
)
from nsa.kernels.tiles import load_rows, wide


@triton.jit
def _store_part(
    part_acc, part_top, part_total, acc, total, top, part_row, split, mask, e,
    ALL: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    at = part_row * ALL + split
    tl.store(part_top + at, top, mask=mask)
    tl.store(part_total + at, total, mask=mask)
    tl.store(part_acc + (at * E)[:, None] + e[None, :], acc, mask=mask[:, None] & (e < E)[None, :])


@triton.jit(do_not_specialize=["window"])
def decode_split_kernel(
    q, cos, sin, k_cmp, v_cmp, k_win, v_win, block_table, lengths, arrivals,
    part_acc, part_top, part_total, own, spill, tops, lse, picks, bits,
    t, pages_per_row, window, num_blocks, num_tops, scale_log2, stride_qb, stride_qt, stride_qh,
    stride_kcp, stride_kcs, stride_kcg, stride_vcp, stride_vcs, stride_vcg,
    stride_kwp, stride_kws, stride_kwg, stride_vwp, stride_vws, stride_vwg,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    REACH: tl.constexpr, STRIDE: tl.constexpr, SELECT: tl.constexpr, PER_BLOCK: tl.constexpr,
    PER_BLOCK_PADDED: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr,
    PAGE_STRIDES: tl.constexpr, RING: tl.constexpr, PAGE_TOKENS: tl.constexpr, ROTATE: tl.constexpr,
    TILES: tl.constexpr, SPLITS: tl.constexpr, SPLITS_PADDED: tl.constexpr, LEAST_TILES: tl.constexpr,
    WINDOW_SPLITS: tl.constexpr, WINDOW_TILES: tl.constexpr, BLOCKS: tl.constexpr,
    HEAD_TILES: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    split, group = tl.program_id(0), tl.program_id(1)
    row, tile_of_row = tl.program_id(2) // TILES, tl.program_id(2) % TILES
    query_tile, head_tile = tile_of_row // HEAD_TILES, tile_of_row % HEAD_TILES
    heads = tl.num_programs(1) * G
    TILE_HEADS: tl.constexpr = GP // HEAD_TILES
    ROWS: tl.constexpr = BLOCK_Q * TILE_HEADS
    ALL: tl.constexpr = SPLITS + WINDOW_SPLITS
    TILE_BLOCKS: tl.constexpr = BLOCK_N // PER_BLOCK_PADDED
    TILE_STRIDES: tl.constexpr = TILE_BLOCKS * PER_BLOCK
    WINDOW_KEYS: tl.constexpr = WINDOW_TILES * BLOCK_N

    # Loaded together, before anything waits for the length.
    length = tl.load(lengths + row)
    only_page = tl.load(block_table + wide(row) * pages_per_row)
    first = query_tile * BLOCK_Q
    rows = tl.arange(0, ROWS)
    column = first + rows // TILE_HEADS
    head = head_tile * TILE_HEADS + rows % TILE_HEADS
    mask = (column < t) & (head < G)
    queries = load_queries(
        q, cos, sin, row, column, group * G + head, mask, t, stride_qb, stride_qt, stride_qh, D, DP, ROTATE
    )
    last = last_position(length, t, first, BLOCK_Q)
    strides, tiles, per_split, active = compressed_plan(last, STRIDE, TILE_STRIDES, SPLITS, LEAST_TILES)
    low, window_active = window_plan(length, t, first, last, window, WINDOW_KEYS)
    if split < SPLITS:
        if split >= active:
            return
    else:
        if split - SPLITS >= window_active:
            return

    position = tl.where(column < t, length - t + column, -1)
    d, e = tl.arange(0, DP), tl.arange(0, EP)
    head_row = (wide(row) * t + column) * heads + group * G + head
    acc = tl.zeros([ROWS, EP], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    offsets = tl.arange(0, BLOCK_N)

    if split < SPLITS:
        k_head = k_cmp + wide(group) * stride_kcg
        v_head = v_cmp + wide(group) * stride_vcg
        # Columns are [selection block, stride in it], the second padded to a power of two. A compressed block that
        # ends with stride number `inside` of a selection block has min(inside + 1, l/d) strides in it.
        inside = offsets % PER_BLOCK_PADDED
        own_weight = tl.minimum(inside + 1, REACH).to(tl.float32)[None, :]
        spill_weight = tl.maximum(REACH - 1 - inside, 0).to(tl.float32)[None, :]
        in_tile = (offsets // PER_BLOCK_PADDED) * PER_BLOCK + inside
        seen = (tl.maximum(position + 1, 0) // STRIDE)[:, None]
        for tile in tl.range(split * per_split, tl.minimum((split + 1) * per_split, tiles), num_stages=STAGES):
            stride = tile * TILE_STRIDES + in_tile
            there = stride < strides
            if PER_BLOCK != PER_BLOCK_PADDED:
                there &= inside < PER_BLOCK
            page, place = page_of(block_table, only_page, row, stride, there, pages_per_row, PAGE_STRIDES)
            k_rows = k_head + page * stride_kcp + place * wide(stride_kcs)
            k = load_rows(k_rows[:, None] + d[None, :], there, d < D, True, D != DP)
            v_rows = v_head + page * stride_vcp + place * wide(stride_vcs)
            v = load_rows(v_rows[:, None] + e[None, :], there, e < E, True, E != EP)
            visible = (there & (stride >= REACH - 1))[None, :] & (stride[None, :] < seen)
            acc, total, top, p, reference = attend_tile(acc, total, top, queries, k, v, visible, scale_log2, PRECISION)

            block = tile * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)
            at = (head_row * num_blocks)[:, None] + block[None, :]
            SHAPE: tl.constexpr = [ROWS, TILE_BLOCKS, PER_BLOCK_PADDED]
            tl.store(own + at, tl.sum(tl.reshape(p * own_weight, SHAPE), 2), mask=mask[:, None])
            if REACH > 1:
                tl.store(spill + at, tl.sum(tl.reshape(p * spill_weight, SHAPE), 2), mask=mask[:, None])
            tl.store(tops + head_row * num_tops + tile, reference, mask=mask)

        _store_part(part_acc, part_top, part_total, acc, total, top, head_row, split, mask, e, ALL, E)
        # With at most n blocks there is nothing to choose.
        if last // SELECT >= N:
            arrival = arrivals + (row * tl.num_programs(1) + group) * 16 + query_tile
            tl.debug_barrier()
            if tl.atomic_add(arrival, 1, sem="acq_rel") == active * HEAD_TILES - 1:
                tl.store(arrival, 0)
                for query in tl.range(first, tl.minimum(first + BLOCK_Q, t)):
                    query_position = length - t + query
                    if query_position // SELECT >= N:
                        query_row = wide(row) * t + query
                        first_head = query_row * heads + group * G
                        merge_lse(part_top, part_total, lse, first_head, active, ALL, SPLITS_PADDED, G, GP)
                        select_blocks(
                            own, spill, tops, lse, picks, bits, first_head,
                            query_row * tl.num_programs(1) + group, query_position,
                            (query_position + 1) // STRIDE, num_blocks, num_tops, SELECT, PER_BLOCK, TILE_BLOCKS,
                            REACH > 1, G, N, NP, INITIAL, LOCAL, BLOCKS,
                        )  # fmt: skip
    else:
        k_head = k_win + wide(group) * stride_kwg
        v_head = v_win + wide(group) * stride_vwg
        begin_key = low + (split - SPLITS) * WINDOW_KEYS
        end_key = tl.minimum(begin_key + WINDOW_KEYS, last + 1)
        for start in tl.range(begin_key, end_key, BLOCK_N, num_stages=STAGES):
            key = start + offsets
            there = key < end_key
            if RING == 0:
                page, place = page_of(block_table, only_page, row, key, there, pages_per_row, PAGE_TOKENS)
            else:
                page, place = wide(row) + key * 0, key % RING
            k_rows = k_head + page * stride_kwp + place * wide(stride_kws)
            k = load_rows(k_rows[:, None] + d[None, :], there, d < D, True, D != DP)
            v_rows = v_head + page * stride_vwp + place * wide(stride_vws)
            v = load_rows(v_rows[:, None] + e[None, :], there, e < E, True, E != EP)
            visible = (key[None, :] <= position[:, None]) & (key[None, :] > (position - window)[:, None])
            visible &= there[None, :]
            acc, total, top, _, _ = attend_tile(acc, total, top, queries, k, v, visible, scale_log2, PRECISION)
        _store_part(part_acc, part_top, part_total, acc, total, top, head_row, split, mask, e, ALL, E)
