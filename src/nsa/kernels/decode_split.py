"""First launch of decoding: compressed and window keys in splits, the importance of blocks gathered in the same pass.

Grid (splits, KV heads, rows x query tiles). A program runs over one split of one row's keys for one tile of queries
x heads and leaves its un-normalised output, maximum and sum. K_cmp is read once: the exponentials that the output
needs are also summed by selection block. The program that finishes a row's compressed keys last selects its blocks
(decode_select.py); a counter in the cache says which one that is, and no sum depends on it.
"""

import triton
import triton.language as tl

from nsa.kernels.decode_select import merge_lse, select_blocks
from nsa.kernels.decode_tiles import begin, compressed_plan, last_position, load_queries, page_of, window_plan
from nsa.kernels.tiles import load_rows, softmax_step, wide


@triton.jit
def _store_part(
    part_acc, part_top, part_total, acc, top, total, part_row, split, mask, e,
    ALL: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    at = part_row * ALL + split
    tl.store(part_top + at, top, mask=mask)
    tl.store(part_total + at, total, mask=mask)
    tl.store(part_acc + (at * E)[:, None] + e[None, :], acc, mask=mask[:, None] & (e < E)[None, :])


@triton.jit(do_not_specialize=["window", "num_blocks", "num_tiles"])
def decode_split_kernel(
    q, cos, sin, k_cmp, v_cmp, k_win, v_win, block_table, lengths, arrivals,
    part_acc, part_top, part_total, own, spill, tops, lse, picks, bits,
    t, pages_per_row, window, num_blocks, num_tiles, scale_log2, stride_qb, stride_qt, stride_qh,
    stride_kcp, stride_kcs, stride_kcg, stride_vcp, stride_vcs, stride_vcg,
    stride_kwp, stride_kws, stride_kwg, stride_vwp, stride_vws, stride_vwg,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    REACH: tl.constexpr, STRIDE: tl.constexpr, SELECT: tl.constexpr, PER_BLOCK: tl.constexpr,
    PER_BLOCK_PADDED: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr,
    PAGE_STRIDES: tl.constexpr, RING: tl.constexpr, PAGE_TOKENS: tl.constexpr, ROTATE: tl.constexpr,
    TILES: tl.constexpr, SPLITS: tl.constexpr, SPLITS_PADDED: tl.constexpr, LEAST_TILES: tl.constexpr,
    WINDOW_SPLITS: tl.constexpr, WINDOW_TILES: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    split, group = tl.program_id(0), tl.program_id(1)
    row, query_tile = tl.program_id(2) // TILES, tl.program_id(2) % TILES
    heads = tl.num_programs(1) * G
    ALL: tl.constexpr = SPLITS + WINDOW_SPLITS
    TILE_BLOCKS: tl.constexpr = BLOCK_N // PER_BLOCK_PADDED
    TILE_STRIDES: tl.constexpr = TILE_BLOCKS * PER_BLOCK
    WINDOW_KEYS: tl.constexpr = WINDOW_TILES * BLOCK_N

    length = tl.load(lengths + row)
    first = query_tile * BLOCK_Q
    last = last_position(length, t, first, BLOCK_Q)
    strides, tiles, per_split, active = compressed_plan(last, STRIDE, TILE_STRIDES, SPLITS, LEAST_TILES)
    low, window_active = window_plan(length, t, first, last, window, WINDOW_KEYS)
    if split < SPLITS:
        if split >= active:
            return
    else:
        if split - SPLITS >= window_active:
            return

    rows = tl.arange(0, BLOCK_Q * GP)
    column = first + rows // GP
    head = rows % GP
    mask = (column < t) & (head < G)
    position = tl.where(column < t, length - t + column, -1)
    d, e = tl.arange(0, DP), tl.arange(0, EP)
    head_row = (wide(row) * t + column) * heads + group * G + head
    queries = load_queries(
        q, cos, sin, row, column, group * G + head, mask, t, stride_qb, stride_qt, stride_qh, D, DP, ROTATE
    )
    acc = tl.zeros([BLOCK_Q * GP, EP], tl.float32)
    total = tl.zeros([BLOCK_Q * GP], tl.float32)
    top = tl.full([BLOCK_Q * GP], float("-inf"), tl.float32)
    offsets = tl.arange(0, BLOCK_N)

    if split < SPLITS:
        k_head = k_cmp + wide(group) * stride_kcg
        v_head = v_cmp + wide(group) * stride_vcg
        # Columns are [selection block, stride in it], the second padded to a power of two. A compressed block that
        # ends with stride number `inside` of a selection block has min(inside + 1, l/d) strides in it.
        inside = offsets % PER_BLOCK_PADDED
        own_weight = tl.minimum(inside + 1, REACH).to(tl.float32)
        spill_weight = tl.maximum(REACH - 1 - inside, 0).to(tl.float32)
        in_tile = (offsets // PER_BLOCK_PADDED) * PER_BLOCK + inside
        seen = tl.maximum(position + 1, 0) // STRIDE
        for tile in tl.range(split * per_split, tl.minimum((split + 1) * per_split, tiles), num_stages=STAGES):
            stride = tile * TILE_STRIDES + in_tile
            there = stride < strides
            if PER_BLOCK != PER_BLOCK_PADDED:
                there &= inside < PER_BLOCK
            page, place = page_of(block_table, row, stride, there, pages_per_row, PAGE_STRIDES)
            k_rows = k_head + page * stride_kcp + place * wide(stride_kcs)
            k = load_rows(k_rows[:, None] + d[None, :], there, d < D, True, D != DP)
            scores = tl.dot(queries, tl.trans(k), input_precision=PRECISION)
            visible = (there & (stride >= REACH - 1))[None, :] & (stride[None, :] < seen[:, None])
            scores = tl.where(visible, scores, float("-inf"))
            v_rows = v_head + page * stride_vcp + place * wide(stride_vcs)
            v = load_rows(v_rows[:, None] + e[None, :], there, e < E, True, E != EP)

            new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
            reference = tl.where(new_top == float("-inf"), 0.0, new_top)
            p = tl.exp2(scores * scale_log2 - reference[:, None])
            rescale = tl.exp2(top - reference)
            total = total * rescale + tl.sum(p, 1)
            acc = acc * rescale[:, None]
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
            top = new_top

            block = tile * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)
            at = (head_row * num_blocks)[:, None] + block[None, :]
            inside_blocks = mask[:, None] & (block < num_blocks)[None, :]
            by_block = tl.reshape(p * own_weight[None, :], [BLOCK_Q * GP, TILE_BLOCKS, PER_BLOCK_PADDED])
            tl.store(own + at, tl.sum(by_block, 2), mask=inside_blocks)
            if REACH > 1:
                by_block = tl.reshape(p * spill_weight[None, :], [BLOCK_Q * GP, TILE_BLOCKS, PER_BLOCK_PADDED])
                tl.store(spill + at, tl.sum(by_block, 2), mask=inside_blocks)
            tl.store(tops + head_row * num_tiles + tile, reference, mask=mask)

        _store_part(part_acc, part_top, part_total, acc, top, total, head_row, split, mask, e, ALL, E)
        # With at most n blocks there is nothing to choose.
        if last // SELECT >= N:
            arrival = arrivals + (row * tl.num_programs(1) + group) * 16 + query_tile
            tl.debug_barrier()
            if tl.atomic_add(arrival, 1, sem="acq_rel") == active - 1:
                tl.store(arrival, 0)
                merge_lse(part_top, part_total, lse, head_row, head_row, active, mask, ALL, SPLITS, SPLITS_PADDED)
                tl.debug_barrier()
                for query in tl.range(first, tl.minimum(first + BLOCK_Q, t)):
                    query_position = length - t + query
                    if query_position // SELECT >= N:
                        query_row = wide(row) * t + query
                        select_blocks(
                            own, spill, tops, lse, picks, bits, query_row * heads + group * G,
                            query_row * tl.num_programs(1) + group, query_position,
                            (query_position + 1) // STRIDE, num_blocks, num_tiles,
                            SELECT, PER_BLOCK, TILE_BLOCKS, REACH > 1, G, N, NP, INITIAL, LOCAL, BLOCKS,
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
                page, place = page_of(block_table, row, key, there, pages_per_row, PAGE_TOKENS)
            else:
                page, place = wide(row) + key * 0, key % RING
            k_rows = k_head + page * stride_kwp + place * wide(stride_kws)
            k = load_rows(k_rows[:, None] + d[None, :], there, d < D, True, D != DP)
            scores = tl.dot(queries, tl.trans(k), input_precision=PRECISION)
            visible = (key[None, :] <= position[:, None]) & (key[None, :] > (position - window)[:, None])
            scores = tl.where(visible & there[None, :], scores, float("-inf"))
            v_rows = v_head + page * stride_vwp + place * wide(stride_vws)
            v = load_rows(v_rows[:, None] + e[None, :], there, e < E, True, E != EP)
            acc, total, top = softmax_step(acc, total, top, scores, scale_log2, v, True, PRECISION)
        _store_part(part_acc, part_top, part_total, acc, top, total, head_row, split, mask, e, ALL, E)
