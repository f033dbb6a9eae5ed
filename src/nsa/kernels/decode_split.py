"""First launch of decoding: compressed and window keys in splits, the importance of blocks gathered in the same pass.

Grid: splits x KV heads x rows x query tiles. A program runs over one split of one row's keys for one tile of queries
x heads and leaves its un-normalised output, maximum and sum. K_cmp is read once: the exponentials that the output
needs are also summed by selection block. The program that finishes a row's compressed keys last selects its blocks
(decode_select.py). Where all programs run at the same time, those of a long row, of more than CHUNK blocks, wait for
each other, so that each scores the blocks of its own run. A counter in the cache says who is last; no sum depends on
it.
"""

import triton
import triton.language as tl

from nsa.kernels.decode_select import choose_blocks, score_blocks, select_few
from nsa.kernels.decode_tiles import (
    attend_tile,
    compressed_plan,
    last_position,
    let_next_begin,
    load_queries,
    page_rows,
    prefetch_rows,
    ring_rows,
    wait_for_last,
    window_plan,
)
from nsa.kernels.tiles import load_rows, wide


@triton.jit
def _store_part(
    part_acc, part_top, part_total, acc, totals, top, part_row, split, parts, mask, e,
    E: tl.constexpr,
):  # fmt: skip
    at = part_row * parts + split
    tl.store(part_top + at, top, mask=mask)
    tl.store(part_total + at, tl.sum(totals, 1), mask=mask)
    to = part_acc + (at * E)[:, None] + e[None, :]
    tl.store(to, acc, mask=mask[:, None] & (e < E)[None, :], eviction_policy="evict_last")


@triton.jit
def _prefetch(
    k_cmp, v_cmp, k_win, v_win, block_table, lengths, row, group, split, first, t, pages_per_row, window, runs,
    stride_kcp, stride_kcg, stride_vcp, stride_vcg, stride_kwp, stride_kwg, stride_vwp, stride_vwg,
    KC_TOKEN: tl.constexpr, VC_TOKEN: tl.constexpr, KW_TOKEN: tl.constexpr, VW_TOKEN: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, STRIDE: tl.constexpr, PAGE_STRIDES: tl.constexpr, RING: tl.constexpr,
    PAGE_TOKENS: tl.constexpr, SPLITS: tl.constexpr, LEAST_TILES: tl.constexpr, WINDOW_TILES: tl.constexpr,
    BLOCK_Q: tl.constexpr, TILE_STRIDES: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Ask for the run's keys and values while the kernel before this one still runs.

    That kernel may be about to change the length, and the page of a row that has but one; then a little too few or
    other keys are asked for.
    """
    length = tl.load(lengths + row, cache_modifier=".cg")
    only_page = tl.load(block_table + wide(row) * pages_per_row, cache_modifier=".cg")
    last = last_position(length, t, first, BLOCK_Q)
    inside = tl.arange(0, BLOCK_N)
    K_BYTES: tl.constexpr = D * k_cmp.dtype.element_ty.primitive_bitwidth // 8
    V_BYTES: tl.constexpr = E * k_cmp.dtype.element_ty.primitive_bitwidth // 8
    if split < runs:
        strides, _, per_split, _ = compressed_plan(last, STRIDE, TILE_STRIDES, SPLITS, LEAST_TILES)
        if PAGE_STRIDES == 0:
            end = tl.minimum((split + 1) * per_split * TILE_STRIDES, strides)
            for start in tl.range(split * per_split * TILE_STRIDES, end, BLOCK_N):
                there = (start + inside < end) & (only_page >= 0)
                k_rows, v_rows = page_rows(
                    k_cmp + wide(group) * stride_kcg, v_cmp + wide(group) * stride_vcg, block_table, only_page, row,
                    start, inside, there, pages_per_row, stride_kcp, stride_vcp, KC_TOKEN, VC_TOKEN, 0,
                )  # fmt: skip
                prefetch_rows(k_rows, there, K_BYTES)
                prefetch_rows(v_rows, there, V_BYTES)
    elif RING > 0:
        low, _ = window_plan(length, t, first, last, window, WINDOW_TILES * BLOCK_N)
        begin = low + (split - runs) * (WINDOW_TILES * BLOCK_N)
        end = tl.minimum(begin + WINDOW_TILES * BLOCK_N, last + 1)
        for start in tl.range(begin, end, BLOCK_N):
            there = start + inside < end
            k_rows, v_rows = ring_rows(
                k_win + wide(group) * stride_kwg, v_win + wide(group) * stride_vwg, row, start, inside,
                stride_kwp, stride_vwp, KW_TOKEN, VW_TOKEN, RING,
            )  # fmt: skip
            prefetch_rows(k_rows, there, K_BYTES)
            prefetch_rows(v_rows, there, V_BYTES)


@triton.jit
def _select(
    sums, tops, part_top, part_total, scores, picks, bits, arrival, row, group, groups, t, first, length, last,
    head_tile, split, active, per_split, parts, is_small, num_blocks, num_tops,
    STRIDE: tl.constexpr, SELECT: tl.constexpr, PER_BLOCK: tl.constexpr, TILE_BLOCKS: tl.constexpr,
    SLOTS: tl.constexpr, SPLITS_PADDED: tl.constexpr, HEAD_TILES: tl.constexpr, BLOCK_Q: tl.constexpr,
    G: tl.constexpr, GP: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr,
    CHUNK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The choice for the queries of a tile, by the last of the row's programs to arrive, or by all of them."""
    programs = active * HEAD_TILES
    tl.debug_barrier()
    arrived = tl.atomic_add(arrival, 1, sem="acq_rel") + 1
    end = tl.minimum(first + BLOCK_Q, t)
    if last // SELECT < CHUNK:
        if arrived == programs:
            tl.store(arrival, 0)
            for query in tl.range(first, end):
                position = length - t + query
                if position // SELECT >= N:
                    pick_row = (wide(row) * t + query) * groups + group
                    select_few(
                        sums, tops, part_top, part_total, picks + pick_row * NP, bits + pick_row * NP, pick_row * G,
                        active, parts, position, num_blocks, num_tops, STRIDE, SELECT, PER_BLOCK, TILE_BLOCKS, SLOTS,
                        SPLITS_PADDED, G, GP, N, NP, INITIAL, LOCAL, CHUNK,
                    )  # fmt: skip
    else:
        # Programs that all run at the same time may wait for each other, and score the blocks of their own run.
        is_shared = (is_small != 0) & (head_tile == 0)
        while is_shared & (arrived < programs):
            arrived = tl.atomic_add(arrival, 0, sem="acquire")
        if is_shared | ((is_small == 0) & (arrived == programs)):
            for query in tl.range(first, end):
                position = length - t + query
                if position // SELECT >= N:
                    pick_row = (wide(row) * t + query) * groups + group
                    tiles = tl.cdiv((position + 1) // STRIDE, PER_BLOCK * TILE_BLOCKS)
                    score_blocks(
                        sums, tops, part_top, part_total, scores + pick_row * num_blocks, pick_row * G, active, parts,
                        tl.where(is_shared, split * per_split, 0),
                        tl.where(is_shared, tl.minimum((split + 1) * per_split, tiles), tiles), tiles, num_blocks,
                        num_tops, TILE_BLOCKS, SLOTS, SPLITS_PADDED, G, GP, CHUNK,
                    )  # fmt: skip
            tl.debug_barrier()
            if is_shared:
                # What has arrived before is `programs`, or more.
                arrived = tl.atomic_add(arrival, 1, sem="acq_rel") + 1 - active
            if arrived == programs:
                tl.store(arrival, 0)
                for query in tl.range(first, end):
                    position = length - t + query
                    if position // SELECT >= N:
                        pick_row = (wide(row) * t + query) * groups + group
                        tiles = tl.cdiv((position + 1) // STRIDE, PER_BLOCK * TILE_BLOCKS)
                        choose_blocks(
                            scores + pick_row * num_blocks, picks + pick_row * NP, bits + pick_row * NP,
                            position // SELECT, tiles * TILE_BLOCKS, N, NP, INITIAL, LOCAL, BLOCKS,
                        )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "row_tiles", "pages_per_row", "window_pages", "window", "runs", "is_small", "num_blocks", "num_tops",
    ]
)  # fmt: skip
def decode_split_kernel(
    q, factors, memory, tables, lengths, arrivals, partials, sums, tops, scores, picks, bits,
    t, groups, row_tiles, pages_per_row, window_pages, window, runs, is_small, num_blocks, num_tops, scale_log2,
    q_strides, strides,
    KC_TOKEN: tl.constexpr, VC_TOKEN: tl.constexpr, KW_TOKEN: tl.constexpr, VW_TOKEN: tl.constexpr,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    REACH: tl.constexpr, STRIDE: tl.constexpr, SELECT: tl.constexpr, PER_BLOCK: tl.constexpr,
    PER_BLOCK_PADDED: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr,
    PAGE_STRIDES: tl.constexpr, RING: tl.constexpr, PAGE_TOKENS: tl.constexpr, WINDOW_TOKENS: tl.constexpr,
    ROTATE: tl.constexpr, TILES: tl.constexpr, SPLITS: tl.constexpr, SPLITS_PADDED: tl.constexpr,
    LEAST_TILES: tl.constexpr, WINDOW_SPLITS: tl.constexpr, WINDOW_TILES: tl.constexpr, CHUNK: tl.constexpr,
    BLOCKS: tl.constexpr, HEAD_TILES: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    cos, sin = factors
    k_cmp, v_cmp, k_win, v_win = memory
    block_table, window_table = tables
    part_acc, part_top, part_total = partials
    stride_qb, stride_qt, stride_qh = q_strides
    stride_kcp, stride_kcg, stride_vcp, stride_vcg, stride_kwp, stride_kwg, stride_vwp, stride_vwg = strides
    # All runs over compressed keys come first, so that the selections have ended when the window's have.
    pid = tl.program_id(0)
    split, rest = pid % runs, pid // runs
    if rest >= row_tiles * groups:
        pid -= runs * row_tiles * groups
        split, rest = runs + pid % WINDOW_SPLITS, pid // WINDOW_SPLITS
    group, rest = rest % groups, rest // groups
    row, tile_of_row = rest // TILES, rest % TILES
    query_tile, head_tile = tile_of_row // HEAD_TILES, tile_of_row % HEAD_TILES
    if PDL:
        if is_small != 0:
            _prefetch(
                k_cmp, v_cmp, k_win, v_win, block_table, lengths, row, group, split, query_tile * BLOCK_Q,
                t, pages_per_row, window, runs, stride_kcp, stride_kcg, stride_vcp, stride_vcg,
                stride_kwp, stride_kwg, stride_vwp, stride_vwg, KC_TOKEN, VC_TOKEN, KW_TOKEN, VW_TOKEN, D, E, STRIDE,
                PAGE_STRIDES, RING, PAGE_TOKENS, SPLITS, LEAST_TILES, WINDOW_TILES, BLOCK_Q,
                BLOCK_N // PER_BLOCK_PADDED * PER_BLOCK, BLOCK_N,
            )  # fmt: skip
    # The next kernel may begin only now: it may then read what the one before this wrote, without waiting.
    wait_for_last(PDL)
    let_next_begin(PDL)
    heads = groups * G
    TILE_HEADS: tl.constexpr = GP // HEAD_TILES
    ROWS: tl.constexpr = BLOCK_Q * TILE_HEADS
    parts = runs + WINDOW_SPLITS
    SLOTS: tl.constexpr = 2 if REACH > 1 else 1
    TILE_BLOCKS: tl.constexpr = BLOCK_N // PER_BLOCK_PADDED
    TILE_STRIDES: tl.constexpr = TILE_BLOCKS * PER_BLOCK
    WINDOW_KEYS: tl.constexpr = WINDOW_TILES * BLOCK_N

    # Loaded together, before anything waits for the length; not from an L1 that may hold what was there before.
    length = tl.load(lengths + row, cache_modifier=".cg")
    only_page = tl.load(block_table + wide(row) * pages_per_row, cache_modifier=".cg")
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
    if split < runs:
        if split >= active:
            return
    else:
        if split - runs >= window_active:
            return

    position = tl.where(column < t, length - t + column, -1)
    d, e = tl.arange(0, DP), tl.arange(0, EP)
    head_row = (wide(row) * t + column) * heads + group * G + head
    acc = tl.zeros([ROWS, EP], tl.float32)
    totals = tl.zeros([ROWS, BLOCK_N], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    offsets = tl.arange(0, BLOCK_N)

    if split < runs:
        k_head = k_cmp + wide(group) * stride_kcg
        v_head = v_cmp + wide(group) * stride_vcg
        # Columns are [selection block, stride in it], the second padded to a power of two. The compressed block that
        # ends with stride number `inside` of a selection block has so many of its l/d strides in the block before.
        inside = offsets % PER_BLOCK_PADDED
        strides_before = tl.maximum(REACH - 1 - inside, 0).to(tl.float32)[None, :]
        in_tile = offsets
        if PER_BLOCK != PER_BLOCK_PADDED:
            in_tile = (offsets // PER_BLOCK_PADDED) * PER_BLOCK + inside
        seen = (tl.maximum(position + 1, 0) // STRIDE)[:, None]
        for tile in tl.range(split * per_split, tl.minimum((split + 1) * per_split, tiles), num_stages=STAGES):
            stride = tile * TILE_STRIDES + in_tile
            there = stride < strides
            if PER_BLOCK != PER_BLOCK_PADDED:
                there &= inside < PER_BLOCK
            k_rows, v_rows = page_rows(
                k_head, v_head, block_table, only_page, row, tile * TILE_STRIDES, in_tile, there, pages_per_row,
                stride_kcp, stride_vcp, KC_TOKEN, VC_TOKEN, PAGE_STRIDES,
            )  # fmt: skip
            k = load_rows(k_rows[:, None] + d[None, :], there, d < D, True, D != DP)
            v = load_rows(v_rows[:, None] + e[None, :], there, e < E, True, E != EP)
            visible = (there & (stride >= REACH - 1))[None, :] & (stride[None, :] < seen)
            acc, totals, top, p, reference = attend_tile(
                acc, totals, top, queries, k, v, visible, scale_log2, PRECISION
            )

            # A block's sums lie side by side: of the compressed blocks that end in it, and of what those that end in
            # the next one reach into it. This tile writes the second sum of the last block of the tile before, too.
            SHAPE: tl.constexpr = [ROWS, TILE_BLOCKS, PER_BLOCK_PADDED]
            found = tl.sum(tl.reshape(p, SHAPE), 2)
            if REACH > 1:
                before = tl.sum(tl.reshape(p * strides_before, SHAPE), 2)
                found = tl.reshape(tl.join(before, found * REACH - before), [ROWS, 2 * TILE_BLOCKS])
            at = tile * (TILE_BLOCKS * SLOTS) + (1 - SLOTS) + tl.arange(0, TILE_BLOCKS * SLOTS)
            tl.store(
                sums + (head_row * (num_blocks * SLOTS))[:, None] + at[None, :], found,
                mask=mask[:, None] & (at >= 0)[None, :], eviction_policy="evict_last",
            )  # fmt: skip
            tl.store(tops + head_row * num_tops + tile, reference, mask=mask)

        if (SLOTS > 1) & (split == active - 1):
            # Nothing ends after the last tile.
            after = tiles * (TILE_BLOCKS * SLOTS) - 1
            tl.store(sums + head_row * (num_blocks * SLOTS) + after, tl.zeros([ROWS], tl.float32), mask=mask)
        _store_part(part_acc, part_top, part_total, acc, totals, top, head_row, split, parts, mask, e, E)
        # With at most n blocks there is nothing to choose.
        if last // SELECT >= N:
            arrival = arrivals + (row * groups + group) * 16 + query_tile
            _select(
                sums, tops, part_top, part_total, scores, picks, bits, arrival, row, group, groups, t, first, length,
                last, head_tile, split, active, per_split, parts, is_small, num_blocks, num_tops, STRIDE, SELECT,
                PER_BLOCK, TILE_BLOCKS, SLOTS, SPLITS_PADDED, HEAD_TILES, BLOCK_Q, G, GP, N, NP, INITIAL, LOCAL, CHUNK,
                BLOCKS,
            )  # fmt: skip
    else:
        # Without a ring the window is in pages, its own or those of the selection branch.
        only_window_page = tl.load(window_table + wide(row) * window_pages, cache_modifier=".cg")
        k_head = k_win + wide(group) * stride_kwg
        v_head = v_win + wide(group) * stride_vwg
        begin_key = low + (split - runs) * WINDOW_KEYS
        end_key = tl.minimum(begin_key + WINDOW_KEYS, last + 1)
        for start in tl.range(begin_key, end_key, BLOCK_N, num_stages=STAGES):
            key = start + offsets
            there = key < end_key
            if RING == 0:
                k_rows, v_rows = page_rows(
                    k_head, v_head, window_table, only_window_page, row, start, offsets, there, window_pages,
                    stride_kwp, stride_vwp, KW_TOKEN, VW_TOKEN, WINDOW_TOKENS,
                )  # fmt: skip
            else:
                k_rows, v_rows = ring_rows(
                    k_head, v_head, row, start, offsets, stride_kwp, stride_vwp, KW_TOKEN, VW_TOKEN, RING
                )
            k = load_rows(k_rows[:, None] + d[None, :], there, d < D, True, D != DP)
            v = load_rows(v_rows[:, None] + e[None, :], there, e < E, True, E != EP)
            visible = (key[None, :] <= position[:, None]) & (key[None, :] > (position - window)[:, None])
            visible &= there[None, :]
            acc, totals, top, _, _ = attend_tile(acc, totals, top, queries, k, v, visible, scale_log2, PRECISION)
        _store_part(part_acc, part_top, part_total, acc, totals, top, head_row, split, parts, mask, e, E)
