"""Second launch of decoding: the selected blocks, the merge of all parts, gates and their sum.

Grid (shares + merges, KV heads, rows x queries). A share attends to some of the selected blocks; a merge puts the
splits of the first launch together for some columns of v. The last of a query's programs to finish adds the parts in
their order and writes the output: which program that is changes no sum.
"""

import triton
import triton.language as tl

from nsa.kernels.decode_tiles import attend_tile, begin, compressed_plan, last_position, load_queries, window_plan
from nsa.kernels.tiles import load_rows, wide


@triton.jit
def _merge(
    part_acc, part_top, part_total, part_row, first, active, mask, e, E: tl.constexpr, ALL: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    """Output [heads, columns e] of the splits first .. first + active - 1; 0 where there is no key."""
    split = tl.arange(0, PADDED)
    at = part_row[:, None] * ALL + (first + split)[None, :]
    there = mask[:, None] & (split < active)[None, :]
    top = tl.load(part_top + at, mask=there, other=float("-inf"), cache_modifier=".cg")
    total = tl.load(part_total + at, mask=there, other=0.0, cache_modifier=".cg")
    acc = tl.load(
        part_acc + (at * E)[:, :, None] + e[None, None, :],
        mask=there[:, :, None] & (e < E)[None, None, :],
        other=0.0,
        cache_modifier=".cg",
    )
    highest = tl.max(top, 1)
    reference = tl.where(highest == float("-inf"), 0.0, highest)
    weight = tl.exp2(top - reference[:, None])
    total = tl.sum(total * weight, 1)
    acc = tl.sum(acc * weight[:, :, None], 1)
    return acc / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit(do_not_specialize=["window"])
def decode_finish_kernel(
    q, cos, sin, k, v, gates, out, block_table, lengths, counts, arrivals,
    part_acc, part_top, part_total, others, slc_acc, slc_top, slc_total, picks,
    t, pages_per_row, window, scale_log2, stride_qb, stride_qt, stride_qh,
    stride_kp, stride_ks, stride_kg, stride_vp, stride_vs, stride_vg,
    G: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    STRIDE: tl.constexpr, SELECT: tl.constexpr, N: tl.constexpr, NP: tl.constexpr,
    PAGE_TOKENS: tl.constexpr, ROTATE: tl.constexpr, HAS_COUNTS: tl.constexpr,
    SPLITS: tl.constexpr, SPLITS_PADDED: tl.constexpr, LEAST_TILES: tl.constexpr, TILE_STRIDES: tl.constexpr,
    WINDOW_SPLITS: tl.constexpr, WINDOW_SPLITS_PADDED: tl.constexpr, WINDOW_KEYS: tl.constexpr,
    SHARES: tl.constexpr, PER_SHARE: tl.constexpr, PICKS: tl.constexpr, MERGES: tl.constexpr, HEAD_TILES: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    share, group = tl.program_id(0), tl.program_id(1)
    head_tile, pair = tl.program_id(2) % HEAD_TILES, tl.program_id(2) // HEAD_TILES
    row, query = pair // t, pair % t
    heads = tl.num_programs(1) * G
    ALL: tl.constexpr = SPLITS + WINDOW_SPLITS
    # Loaded together, before anything waits for the length.
    length = tl.load(lengths + row)
    only_page = tl.load(block_table + wide(row) * pages_per_row)
    head = head_tile * ROWS + tl.arange(0, ROWS)
    mask = head < G
    e = tl.arange(0, EP)
    query_row = wide(row) * t + query
    head_row = query_row * heads + group * G + head
    out_at = (head_row * E)[:, None] + e[None, :]
    out_mask = mask[:, None] & (e < E)[None, :]
    position = length - t + query
    is_padding = position < 0
    if HAS_COUNTS:
        is_padding |= query < t - tl.load(counts + row)
    if is_padding:
        if share == 0:
            tl.store(out + out_at, tl.zeros([ROWS, EP], out.dtype.element_ty), mask=out_mask)
        return

    if share < SHARES:
        own_block = position // SELECT
        queries = load_queries(
            q, cos, sin, row, query + head * 0, group * G + head, mask, t, stride_qb, stride_qt, stride_qh,
            D, DP, ROTATE,
        )  # fmt: skip
        acc = tl.zeros([ROWS, EP], tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        offsets, d = tl.arange(0, BLOCK_N), tl.arange(0, DP)
        k_head = k + wide(group) * stride_kg
        v_head = v + wide(group) * stride_vg
        pick_row = (query_row * tl.num_programs(1) + group) * NP
        table = block_table + wide(row) * pages_per_row
        first_pick = share * PER_SHARE
        num_picks = tl.minimum(tl.minimum(PER_SHARE, N - first_pick), own_block + 1 - first_pick)
        # The share's blocks and their pages, before the loop, whose loads then wait for no other. Up to n blocks, all
        # are read, and the first launch has chosen none.
        slot = tl.arange(0, PICKS)
        pick = first_pick + slot
        blocks = tl.load(picks + pick_row + pick, mask=(slot < num_picks) & (own_block >= N), other=0)
        blocks = tl.where(own_block >= N, blocks, pick)
        pages = only_page + slot * 0
        if PAGE_TOKENS > 0:
            # A block lies in one page.
            pages = tl.load(table + blocks * SELECT // PAGE_TOKENS, mask=slot < num_picks, other=0)
        STEPS: tl.constexpr = (SELECT + BLOCK_N - 1) // BLOCK_N
        for step in tl.range(0, num_picks * STEPS, num_stages=STAGES):
            is_this = slot == step // STEPS
            block = tl.sum(tl.where(is_this, blocks, 0), 0)
            page = tl.sum(tl.where(is_this, pages, 0), 0)
            in_block = step % STEPS * BLOCK_N + offsets
            key = block * SELECT + in_block
            there = in_block < SELECT
            place = key
            if PAGE_TOKENS > 0:
                place = key % PAGE_TOKENS
            there &= key <= position
            k_rows = k_head + page.to(tl.int64) * stride_kp + place * wide(stride_ks)
            keys = load_rows(k_rows[:, None] + d[None, :], there, d < D, True, D != DP)
            v_rows = v_head + page.to(tl.int64) * stride_vp + place * wide(stride_vs)
            values = load_rows(v_rows[:, None] + e[None, :], there, e < E, True, E != EP)
            acc, total, top, _, _ = attend_tile(
                acc, total, top, queries, keys, values, there[None, :], scale_log2, PRECISION
            )
        part = head_row * SHARES + share
        tl.store(slc_top + part, top, mask=mask)
        tl.store(slc_total + part, total, mask=mask)
        tl.store(slc_acc + (part * E)[:, None] + e[None, :], acc, mask=out_mask)
    else:
        COLUMNS: tl.constexpr = EP // MERGES
        first = query // BLOCK_Q * BLOCK_Q
        last = last_position(length, t, first, BLOCK_Q)
        _, _, _, active = compressed_plan(last, STRIDE, TILE_STRIDES, SPLITS, LEAST_TILES)
        _, window_active = window_plan(length, t, first, last, window, WINDOW_KEYS)
        columns = (share - SHARES) * COLUMNS + tl.arange(0, COLUMNS)
        gate_cmp = tl.load(gates + head_row * 3, mask=mask, other=0.0).to(tl.float32)
        gate_win = tl.load(gates + head_row * 3 + 2, mask=mask, other=0.0).to(tl.float32)
        both = gate_cmp[:, None] * _merge(
            part_acc, part_top, part_total, head_row, 0, active, mask, columns, E, ALL, SPLITS_PADDED
        )
        both += gate_win[:, None] * _merge(
            part_acc, part_top, part_total, head_row, SPLITS, window_active, mask, columns, E, ALL,
            WINDOW_SPLITS_PADDED,
        )  # fmt: skip
        to = others + (head_row * E)[:, None] + columns[None, :]
        tl.store(to, both, mask=mask[:, None] & (columns < E)[None, :])

    arrival = arrivals + (row * tl.num_programs(1) + group) * 16 + query
    tl.debug_barrier()
    if tl.atomic_add(arrival, 1, sem="acq_rel") == (SHARES + MERGES) * HEAD_TILES - 1:
        tl.store(arrival, 0)
        number = tl.arange(0, SHARES)[None, :]
        for tile in tl.static_range(HEAD_TILES):
            head = tile * ROWS + tl.arange(0, ROWS)
            mask = head < G
            head_row = query_row * heads + group * G + head
            out_at = (head_row * E)[:, None] + e[None, :]
            out_mask = mask[:, None] & (e < E)[None, :]
            gate_slc = tl.load(gates + head_row * 3 + 1, mask=mask, other=0.0).to(tl.float32)
            parts = head_row[:, None] * SHARES + number
            there = mask[:, None] & (number >= 0)
            tops = tl.load(slc_top + parts, mask=there, other=float("-inf"), cache_modifier=".cg")
            totals = tl.load(slc_total + parts, mask=there, other=0.0, cache_modifier=".cg")
            highest = tl.max(tops, 1)
            highest = tl.where(highest == float("-inf"), 0.0, highest)
            divisor = tl.sum(totals * tl.exp2(tops - highest[:, None]), 1)
            result = tl.zeros([ROWS, EP], tl.float32)
            for i in tl.static_range(SHARES):
                one = head_row * SHARES + i
                values_of = tl.load(
                    slc_acc + (one * E)[:, None] + e[None, :], mask=out_mask, other=0.0, cache_modifier=".cg"
                )
                one_top = tl.load(slc_top + one, mask=mask, other=float("-inf"), cache_modifier=".cg")
                result += values_of * tl.exp2(one_top - highest)[:, None]
            result *= (gate_slc / tl.where(divisor == 0.0, 1.0, divisor))[:, None]
            result += tl.load(others + out_at, mask=out_mask, other=0.0, cache_modifier=".cg")
            tl.store(out + out_at, result.to(out.dtype.element_ty), mask=out_mask)
