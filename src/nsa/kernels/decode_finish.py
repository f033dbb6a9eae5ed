"""Second launch of decoding: the selected blocks, the merge of all parts, gates and their sum.

Grid: shares + merges x KV heads x rows x queries. A share attends to some of the selected blocks; with many rows a
program has several shares, one after the other. A merge puts the splits of the first launch together for some columns
of v. The last of a query's programs to finish adds the parts in their order and writes the output: which program that
is changes no sum.
"""

import triton
import triton.language as tl

from nsa.kernels.decode_tiles import (
    attend_tile,
    compressed_plan,
    last_position,
    let_next_begin,
    load_queries,
    wait_for_last,
    window_plan,
)
from nsa.kernels.tiles import load_rows, wide


@triton.jit
def _merge(
    part_acc, part_top, part_total, part_row, parts, first, active, mask, e, E: tl.constexpr, PADDED: tl.constexpr
):  # fmt: skip
    """Output [heads, columns e] of the splits first .. first + active - 1; 0 where there is no key."""
    split = tl.arange(0, PADDED)
    at = part_row[:, None] * parts + (first + split)[None, :]
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


@triton.jit
def _store_share(slc_acc, slc_top, slc_total, acc, totals, top, to, mask, e, E: tl.constexpr):
    tl.store(slc_top + to, top, mask=mask)
    tl.store(slc_total + to, tl.sum(totals, 1), mask=mask)
    tl.store(slc_acc + (to * E)[:, None] + e[None, :], acc, mask=mask[:, None] & (e < E)[None, :])


@triton.jit(do_not_specialize=["row_tiles", "pages_per_row", "window", "runs"])
def decode_finish_kernel(
    q, factors, memory, gates, out, block_table, lengths, counts, arrivals, partials, others, slc, picks,
    t, groups, row_tiles, pages_per_row, window, runs, scale_log2, q_strides, gates_strides, strides,
    K_TOKEN: tl.constexpr, V_TOKEN: tl.constexpr,
    G: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    STRIDE: tl.constexpr, SELECT: tl.constexpr, SELECT_PADDED: tl.constexpr, N: tl.constexpr, NP: tl.constexpr,
    PAGE_TOKENS: tl.constexpr, ROTATE: tl.constexpr, HAS_COUNTS: tl.constexpr,
    SPLITS: tl.constexpr, SPLITS_PADDED: tl.constexpr, LEAST_TILES: tl.constexpr, TILE_STRIDES: tl.constexpr,
    WINDOW_SPLITS: tl.constexpr, WINDOW_SPLITS_PADDED: tl.constexpr, WINDOW_KEYS: tl.constexpr,
    SHARES: tl.constexpr, PER_SHARE: tl.constexpr, TOGETHER: tl.constexpr, PICKS: tl.constexpr, MERGES: tl.constexpr,
    HEAD_TILES: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    cos, sin = factors
    k, v = memory
    part_acc, part_top, part_total = partials
    slc_acc, slc_top, slc_total = slc
    stride_qb, stride_qt, stride_qh = q_strides
    stride_gb, stride_gt, stride_gh = gates_strides
    stride_kp, stride_kg, stride_vp, stride_vg = strides
    let_next_begin(PDL)
    PROGRAMS: tl.constexpr = SHARES // TOGETHER
    # All shares come first: they take longest.
    pid = tl.program_id(0)
    part, rest = pid % PROGRAMS, pid // PROGRAMS
    if rest >= row_tiles * groups:
        pid -= PROGRAMS * row_tiles * groups
        part, rest = PROGRAMS + pid % MERGES, pid // MERGES
    group, rest = rest % groups, rest // groups
    head_tile, pair = rest % HEAD_TILES, rest // HEAD_TILES
    row, query = pair // t, pair % t
    heads = groups * G
    parts = runs + WINDOW_SPLITS
    # What the first launch did not write, and what it waited for itself, is loaded before it ends; all at once.
    length = tl.load(lengths + row, cache_modifier=".cg")
    only_page = tl.load(block_table + wide(row) * pages_per_row, cache_modifier=".cg")
    head = head_tile * ROWS + tl.arange(0, ROWS)
    mask = head < G
    e = tl.arange(0, EP)
    query_row = wide(row) * t + query
    head_row = query_row * heads + group * G + head
    out_at = (head_row * E)[:, None] + e[None, :]
    out_mask = mask[:, None] & (e < E)[None, :]
    gates += wide(row) * stride_gb + wide(query) * stride_gt
    position = length - t + query
    is_padding = position < 0
    if HAS_COUNTS:
        is_padding |= query < t - tl.load(counts + row)
    queries = load_queries(
        q, cos, sin, row, query + head * 0, group * G + head, mask & (part < PROGRAMS), t, stride_qb, stride_qt,
        stride_qh, D, DP, ROTATE,
    )  # fmt: skip
    wait_for_last(PDL)
    if is_padding:
        if part == 0:
            tl.store(out + out_at, tl.zeros([ROWS, EP], out.dtype.element_ty), mask=out_mask)
        return

    if part < PROGRAMS:
        own_block = position // SELECT
        acc = tl.zeros([ROWS, EP], tl.float32)
        totals = tl.zeros([ROWS, BLOCK_N], tl.float32)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        offsets, d = tl.arange(0, BLOCK_N), tl.arange(0, DP)
        k_head = k + wide(group) * stride_kg
        v_head = v + wide(group) * stride_vg
        pick_row = (query_row * groups + group) * NP
        table = block_table + wide(row) * pages_per_row
        first_pick = part * TOGETHER * PER_SHARE
        num_picks = tl.minimum(N, own_block + 1) - first_pick
        # The program's blocks and their pages, before the loop, whose loads then wait for no other. Up to n blocks, all
        # are read, and the first launch has chosen none.
        slot = tl.arange(0, PICKS)
        pick = first_pick + slot
        blocks = tl.load(picks + pick_row + pick, mask=(slot < num_picks) & (own_block >= N), other=0)
        blocks = tl.where(own_block >= N, blocks, pick)
        pages = only_page + slot * 0
        if PAGE_TOKENS > 0:
            # A block lies in one page.
            pages = tl.load(table + blocks * SELECT // PAGE_TOKENS, mask=slot < num_picks, other=0)
        # A tile is some blocks, or a block some tiles.
        PADDED: tl.constexpr = BLOCK_N if BLOCK_N < SELECT_PADDED else SELECT_PADDED
        AT_ONCE: tl.constexpr = BLOCK_N // PADDED
        STEPS: tl.constexpr = (SELECT + PADDED - 1) // PADDED
        TILES: tl.constexpr = (PER_SHARE + AT_ONCE - 1) // AT_ONCE * STEPS
        for step in tl.range(0, TOGETHER * TILES, num_stages=STAGES):
            share, tile = step // TILES, step % TILES
            in_block = tile % STEPS * PADDED + offsets % PADDED
            there = in_block < SELECT
            k_rows = k_head + in_block * K_TOKEN
            v_rows = v_head + in_block * V_TOKEN
            for i in tl.static_range(AT_ONCE):
                in_share = tile // STEPS * AT_ONCE + i
                number = share * PER_SHARE + in_share
                is_this = slot == number
                block = tl.sum(tl.where(is_this, blocks, 0), 0)
                page = tl.sum(tl.where(is_this, pages, 0), 0).to(tl.int64)
                start = block * SELECT
                place = start
                if PAGE_TOKENS > 0:
                    place = start % PAGE_TOKENS
                is_mine = offsets // PADDED == i
                # So many keys of this block are there.
                is_pick = (in_share < PER_SHARE) & (number < num_picks)
                there &= ~is_mine | (in_block < tl.where(is_pick, position + 1 - start, 0))
                k_rows += tl.where(is_mine, page * stride_kp + wide(place) * K_TOKEN, 0)
                v_rows += tl.where(is_mine, page * stride_vp + wide(place) * V_TOKEN, 0)
            keys = load_rows(k_rows[:, None] + d[None, :], there, d < D, True, D != DP)
            values = load_rows(v_rows[:, None] + e[None, :], there, e < E, True, E != EP)
            acc, totals, top, _, _ = attend_tile(
                acc, totals, top, queries, keys, values, there[None, :], scale_log2, PRECISION
            )
            if TOGETHER > 1:
                if tile == TILES - 1:
                    to = head_row * SHARES + part * TOGETHER + share
                    _store_share(slc_acc, slc_top, slc_total, acc, totals, top, to, mask, e, E)
                    # The next share begins anew: what was summed is rescaled to nothing.
                    top = tl.full([ROWS], float("-inf"), tl.float32)
        if TOGETHER == 1:
            _store_share(slc_acc, slc_top, slc_total, acc, totals, top, head_row * SHARES + part, mask, e, E)
    else:
        COLUMNS: tl.constexpr = EP // MERGES
        first = query // BLOCK_Q * BLOCK_Q
        last = last_position(length, t, first, BLOCK_Q)
        _, _, _, active = compressed_plan(last, STRIDE, TILE_STRIDES, SPLITS, LEAST_TILES)
        _, window_active = window_plan(length, t, first, last, window, WINDOW_KEYS)
        columns = (part - PROGRAMS) * COLUMNS + tl.arange(0, COLUMNS)
        gate_at = wide(group * G + head) * stride_gh
        gate_cmp = tl.load(gates + gate_at, mask=mask, other=0.0).to(tl.float32)
        gate_win = tl.load(gates + gate_at + 2, mask=mask, other=0.0).to(tl.float32)
        both = gate_cmp[:, None] * _merge(
            part_acc, part_top, part_total, head_row, parts, 0, active, mask, columns, E, SPLITS_PADDED
        )
        both += gate_win[:, None] * _merge(
            part_acc, part_top, part_total, head_row, parts, runs, window_active, mask, columns, E,
            WINDOW_SPLITS_PADDED,
        )  # fmt: skip
        to = others + (head_row * E)[:, None] + columns[None, :]
        tl.store(to, both, mask=mask[:, None] & (columns < E)[None, :])

    arrival = arrivals + (row * groups + group) * 16 + query
    tl.debug_barrier()
    if tl.atomic_add(arrival, 1, sem="acq_rel") == (PROGRAMS + MERGES) * HEAD_TILES - 1:
        tl.store(arrival, 0)
        number = tl.arange(0, SHARES)[None, :]
        for tile in tl.static_range(HEAD_TILES):
            head = tile * ROWS + tl.arange(0, ROWS)
            mask = head < G
            head_row = query_row * heads + group * G + head
            out_at = (head_row * E)[:, None] + e[None, :]
            out_mask = mask[:, None] & (e < E)[None, :]
            gate_at = wide(group * G + head) * stride_gh
            gate_slc = tl.load(gates + gate_at + 1, mask=mask, other=0.0).to(tl.float32)
            at = head_row[:, None] * SHARES + number
            there = mask[:, None] & (number >= 0)
            their_tops = tl.load(slc_top + at, mask=there, other=float("-inf"), cache_modifier=".cg")
            their_totals = tl.load(slc_total + at, mask=there, other=0.0, cache_modifier=".cg")
            highest = tl.max(their_tops, 1)
            highest = tl.where(highest == float("-inf"), 0.0, highest)
            divisor = tl.sum(their_totals * tl.exp2(their_tops - highest[:, None]), 1)
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
