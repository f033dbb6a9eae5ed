"""Appending to a cache in one launch: write the new tokens, compress the blocks they complete, advance the lengths.

Grid: rows x t tokens, then row tiles x parts of phi.

token   its keys and values to their pages and rings, rotated on the way
part    of 16 (row, block, head) that may complete a block, keys or values: some units of phi's first layer, so that
        its weights are read once for them, or the mean. The last of a tile's parts to arrive does the rest of phi,
        the rotation at the block's first position, and writes the compressed keys or values

No program waits for another: parts read new tokens from the arguments and older ones from the ring. All programs read
the lengths before they arrive at a counter, where the last one writes the new lengths, and a part whose tile completes
nothing ends there. No sum depends on who is last.

The next kernel may begin when all have arrived: begun at once, the attention's first launch takes 10 to 14 us longer
(docs/kernels.md).

The counters are the first of the cache's `arrivals`, which belong to the attention at other times: every launch waits
for what came before it, and only then arrives.
"""

import triton
import triton.language as tl

from nsa.kernels.decode_tiles import let_next_begin, page_of, wait_for_last
from nsa.kernels.tiles import wide


@triton.jit
def _arrive(counter, number):
    """Whether this program is the last of so many, for which all that the others did before is done."""
    tl.debug_barrier()
    is_last = tl.atomic_add(counter, 1, sem="acq_rel") == number - 1
    if is_last:
        tl.store(counter, 0)
    return is_last


@triton.jit
def _token(
    x, cos, sin, row, column, t, groups, stride_xb, stride_xt, stride_xg,
    GROUPS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """A new token's heads [GROUPS, DP] as they are kept."""
    group, d = tl.arange(0, GROUPS), tl.arange(0, DP)
    mask = (group < groups)[:, None] & (d < D)[None, :]
    rows = x + wide(row) * stride_xb + wide(column) * stride_xt + (wide(group) * stride_xg)[:, None]
    token = tl.load(rows + d[None, :], mask=mask, other=0.0)
    if ROTATE:
        partner = tl.where(d < D // 2, d + D // 2, d - D // 2)
        y = tl.load(rows + partner[None, :], mask=mask, other=0.0).to(tl.float32)
        y = tl.where((d < D // 2)[None, :], -y, y)
        at = (wide(row) * t + column) * D + d
        c = tl.load(cos + at, mask=d < D, other=0.0).to(tl.float32)[None, :]
        s = tl.load(sin + at, mask=d < D, other=0.0).to(tl.float32)[None, :]
        token = (token.to(tl.float32) * c + y * s).to(x.dtype.element_ty)
    return token


@triton.jit
def _ring_of(table, row, position, there, pages, RING: tl.constexpr, PAGED: tl.constexpr):
    """Ring (or page) and slot of a token, and whether the row has that page."""
    page = row
    if PAGED:
        inside = there & (position // RING < pages)
        page = tl.load(table + wide(row) * pages + position // RING, mask=inside, other=-1)
        there = inside & (page >= 0)
    return page, position % RING, there


@triton.jit
def _keep(
    memory, token, page, place, there, groups, stride_p, stride_s, stride_g,
    GROUPS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    group, d = tl.arange(0, GROUPS), tl.arange(0, DP)
    rows = memory + wide(page) * stride_p + wide(place) * stride_s + (wide(group) * stride_g)[:, None]
    tl.store(rows + d[None, :], token, mask=there & (group < groups)[:, None] & (d < D)[None, :])


@triton.jit
def _blocks(
    flat, total, lengths, counts, t, groups, num_new,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr, HAS_COUNTS: tl.constexpr,
):  # fmt: skip
    """Row, number among the row's new strides, head, length, new tokens, last stride; whether a block completes."""
    inside = flat < total
    row, number, head = flat // (groups * num_new), flat // groups % num_new, flat % groups
    length = tl.load(lengths + row, mask=inside, other=0)
    new = tl.load(counts + row, mask=inside, other=0) if HAS_COUNTS else row * 0 + t
    last = length // STRIDE + number
    end = (last + 1) * STRIDE
    return row, number, head, length, new, last, inside & (end <= length + new) & (end >= BLOCK)


@triton.jit
def _old_rows(
    ring, table, row, head, first, length, complete, pages, stride_r, stride_g,
    BLOCK: tl.constexpr, RING: tl.constexpr, PAGED: tl.constexpr,
):  # fmt: skip
    """Where the ring begins that the tokens first .. first + BLOCK - 1 lie in; of pages, which no block is longer
    than, those of the first token and of the last one."""
    if PAGED:
        at = table + wide(row) * pages
        last = first + BLOCK - 1
        page = tl.load(at + first // RING, mask=complete, other=0)
        next_page = tl.load(at + last // RING, mask=complete & (last // RING * RING < length), other=0)
        old, others = ring + wide(page) * stride_r, ring + wide(next_page) * stride_r
    else:
        old = ring + wide(row) * stride_r
        others = old
    return old + wide(head) * stride_g, others + wide(head) * stride_g


@triton.jit
def _token_rows(
    x, old, others, row, head, first, token, length, new, t, stride_xb, stride_xt, stride_xg, stride_s,
    RING: tl.constexpr, PAGED: tl.constexpr,
):  # fmt: skip
    """Where a row's token first + token begins: among the new ones, or in the ring, or in one of two pages."""
    position = first + token
    if PAGED:
        old_row = tl.where(position // RING == first // RING, old, others) + wide(position % RING) * stride_s
    else:
        old_row = old + wide(position % RING) * stride_s
    column = position - length + t - new
    new_row = x + wide(row) * stride_xb + wide(head) * stride_xg + wide(column) * stride_xt
    return tl.where(position >= length, new_row, old_row)


@triton.jit
def _add(acc, lost, part, PRECISION: tl.constexpr):
    """acc + part. In fp32 what a sum of many terms loses goes into the next, or it would round more than PyTorch's."""
    if PRECISION == "ieee":
        part -= lost
        new_acc = acc + part
        lost = (new_acc - acc) - part
        acc = new_acc
    else:
        acc += part
    return acc, lost


@triton.jit
def _first_layer(
    x, old, others, position_encoding, weight, bias, hidden, row, head, length, new, first, complete, first_unit, t,
    units, stride_xb, stride_xt, stride_xg, stride_s,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, RING: tl.constexpr, PAGED: tl.constexpr,
    IS_MLP: tl.constexpr, UNITS: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr, SLICE: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Some outputs of the blocks' first layer, fp32, to the rows `hidden`; activated for the MLP.

    Each warp has slices of the tokens, and sums, of its own: see step.py.
    """
    unit = first_unit + tl.arange(0, UNITS)
    # Units past the end compute the last one again, and are not stored.
    weight_rows = weight + (wide(tl.minimum(unit, units - 1)) * (BLOCK * D))[None, :, None]
    row, head, length, new = row[None, :, None], head[None, :, None], length[None, :, None], new[None, :, None]
    old, others = old[None, :, None], others[None, :, None]
    first, is_row = first[None, :, None], complete[None, :, None]
    warp, number = tl.arange(0, WARPS)[:, None, None], tl.arange(0, SLICE)[None, None, :]
    MASK: tl.constexpr = (D != DP) or (BLOCK * DP % (WARPS * SLICE) != 0)
    acc = tl.zeros([WARPS, ROWS, UNITS], tl.float32)
    lost = tl.zeros([WARPS, ROWS, UNITS], tl.float32)
    for start in tl.range(0, BLOCK * DP, WARPS * SLICE, num_stages=STAGES):
        first_number = start + warp * SLICE
        token = first_number // DP
        d = first_number - token * DP + number
        rows = _token_rows(
            x, old, others, row, head, first, token, length, new, t, stride_xb, stride_xt, stride_xg, stride_s,
            RING, PAGED,
        )  # fmt: skip
        at = token * D + d
        if MASK:
            inside = (d < D) & (token < BLOCK)
            tokens = tl.load(rows + d, mask=is_row & inside, other=0.0)
            w = tl.load(weight_rows + at, mask=inside, other=0.0)
        else:
            tokens = tl.load(rows + d, mask=is_row, other=0.0)
            w = tl.load(weight_rows + at)
        if IS_MLP:
            if MASK:
                encoding = tl.load(position_encoding + at, mask=inside, other=0.0)
            else:
                encoding = tl.load(position_encoding + at)
            tokens = (tokens.to(tl.float32) + encoding.to(tl.float32)).to(x.dtype.element_ty)
        part = tl.dot(tokens, tl.permute(w.to(tokens.dtype), (0, 2, 1)), input_precision=PRECISION)
        acc, lost = _add(acc, lost, part, PRECISION)
    y = tl.sum(acc, 0)
    if IS_MLP:
        y += tl.load(bias + unit, mask=unit < units, other=0.0).to(tl.float32)[None, :]
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    tl.store(hidden[:, None] + unit[None, :], y, mask=complete[:, None] & (unit < units)[None, :])


@triton.jit
def _mean(
    x, old, others, out, row, head, length, new, first, complete, t, stride_xb, stride_xt, stride_xg, stride_s,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, RING: tl.constexpr, PAGED: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """The blocks' means, fp32, to the rows `out`."""
    d = tl.arange(0, DP)
    mask = complete[:, None] & (d < D)[None, :]
    total = tl.zeros([ROWS, DP], tl.float32)
    for token in tl.range(0, BLOCK, loop_unroll_factor=8):
        rows = _token_rows(
            x, old, others, row, head, first, token, length, new, t, stride_xb, stride_xt, stride_xg, stride_s,
            RING, PAGED,
        )  # fmt: skip
        total += tl.load(rows[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out[:, None] + d[None, :], total / BLOCK, mask=mask)


@triton.jit
def _phi(
    hidden, weight, bias, complete, column, mask, units, DP: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr,
    INNER: tl.constexpr, PRECISION: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """phi of the blocks, fp32 [rows, DP], from its parts: the outputs numbered `column`, in any order."""
    mean = column + (units if KIND == 2 else 0)
    result = tl.load(
        hidden[:, None] + mean[None, :], mask=complete[:, None] & mask[None, :], other=0.0, cache_modifier=".cg"
    )
    if KIND == 2:
        acc = tl.zeros([ROWS, DP], tl.float32)
        lost = tl.zeros([ROWS, DP], tl.float32)
        for start in tl.range(0, units, INNER):
            unit = start + tl.arange(0, INNER)
            h = tl.load(
                hidden[:, None] + unit[None, :], mask=complete[:, None] & (unit < units)[None, :], other=0.0,
                cache_modifier=".cg",
            )  # fmt: skip
            w = tl.load(
                weight + column[:, None] * units + unit[None, :], mask=mask[:, None] & (unit < units)[None, :],
                other=0.0,
            ).to(dtype)  # fmt: skip
            acc, lost = _add(acc, lost, tl.dot(h.to(dtype), tl.trans(w), input_precision=PRECISION), PRECISION)
        result += acc + tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)[None, :]
    return result


@triton.jit
def _compress(
    x, ring, to, phi, factors, hidden, arrival, part, parts, block_table, raw_table, flat, row, number, head, length,
    new, last, complete, t, num_new, pages_per_row, raw_pages, room, units, x_strides, ring_strides, strides,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr, RING: tl.constexpr,
    PAGED: tl.constexpr, PAGE_STRIDES: tl.constexpr, ROTATE: tl.constexpr, KIND: tl.constexpr, UNITS: tl.constexpr,
    ROWS: tl.constexpr, WARPS: tl.constexpr, SLICE: tl.constexpr, INNER: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A part of phi of a tile's blocks, keys or values; the last of them writes the compressed ones."""
    position_encoding, weight_in, bias_in, weight_out, bias_out = phi
    cos, sin = factors
    stride_xb, stride_xt, stride_xg = x_strides
    stride_r, stride_s, stride_g = ring_strides
    stride_p, stride_c, stride_h = strides
    # What the parts leave for a block: the first layer's units, then the mean; only the one for linear, or mean.
    hidden += wide(flat) * (units + (0 if KIND == 1 else D))
    first = (last + 1) * STRIDE - BLOCK
    old, others = _old_rows(
        ring, raw_table, row, head, first, length, complete, raw_pages, stride_r, stride_g, BLOCK, RING, PAGED
    )
    if KIND > 0:
        if part * UNITS < units:
            _first_layer(
                x, old, others, position_encoding, weight_in, bias_in, hidden, row, head, length, new, first, complete,
                part * UNITS, t, units, stride_xb, stride_xt, stride_xg, stride_s,
                D, DP, BLOCK, RING, PAGED, KIND == 2, UNITS, ROWS, WARPS, SLICE, STAGES, PRECISION,
            )  # fmt: skip
    if KIND != 1:
        if part == parts - 1:
            _mean(
                x, old, others, hidden + units, row, head, length, new, first, complete, t,
                stride_xb, stride_xt, stride_xg, stride_s, D, DP, BLOCK, RING, PAGED, ROWS,
            )  # fmt: skip
    if _arrive(arrival, parts):
        there = complete & (last < room // STRIDE)
        only_page = tl.load(block_table + wide(row) * pages_per_row, mask=there, other=0)
        page, place = page_of(block_table, only_page, row, last, there, pages_per_row, PAGE_STRIDES)
        there &= page >= 0
        out = to + page * stride_p + wide(place) * stride_c + wide(head) * stride_h
        dtype: tl.constexpr = to.dtype.element_ty
        if ROTATE:
            # The two halves, each padded, so that the partners of a pair lie half a row apart.
            HALF: tl.constexpr = DP // 2
            place_in = tl.arange(0, DP)
            column = place_in // HALF * (D // 2) + place_in % HALF
            y = _phi(
                hidden, weight_out, bias_out, complete, column, place_in % HALF < D // 2, units,
                DP, KIND, ROWS, INNER, PRECISION, dtype,
            )  # fmt: skip
            low, high = tl.split(tl.permute(tl.reshape(y, [ROWS, 2, HALF]), (0, 2, 1)))
            d = tl.arange(0, HALF)
            mask = there[:, None] & (d < D // 2)[None, :]
            at = ((wide(row) * num_new + number) * D)[:, None] + d[None, :]
            c, s = _factors(cos, sin, at, mask)
            tl.store(out[:, None] + d[None, :], (low * c - high * s).to(dtype), mask=mask)
            c, s = _factors(cos, sin, at + D // 2, mask)
            tl.store(out[:, None] + (d + D // 2)[None, :], (high * c + low * s).to(dtype), mask=mask)
        else:
            e = tl.arange(0, DP)
            y = _phi(hidden, weight_out, bias_out, complete, e, e < D, units, DP, KIND, ROWS, INNER, PRECISION, dtype)
            tl.store(out[:, None] + e[None, :], y.to(dtype), mask=there[:, None] & (e < D)[None, :])


@triton.jit
def _factors(cos, sin, at, mask):
    c = tl.load(cos + at, mask=mask, other=0.0).to(tl.float32)
    return c, tl.load(sin + at, mask=mask, other=0.0).to(tl.float32)


# One kernel for caches of every size.
@triton.jit(do_not_specialize=["rows", "pages_per_row", "window_pages", "raw_pages", "room"])
def decode_append_kernel(
    new_tokens, factors, memory, phi_k, phi_v, factors_cmp, hidden, tables, lengths, counts, arrivals,
    rows, t, groups, num_new, pages_per_row, window_pages, raw_pages, room, units, parts, new_strides, strides,
    GROUPS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr, PAGE_TOKENS: tl.constexpr, PAGE_STRIDES: tl.constexpr,
    RING: tl.constexpr, RAW_RING: tl.constexpr, PAGED: tl.constexpr, HAS_WINDOW: tl.constexpr, ROTATE: tl.constexpr,
    HAS_COUNTS: tl.constexpr, KIND: tl.constexpr, UNITS: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr,
    SLICE_D: tl.constexpr, SLICE_E: tl.constexpr, INNER: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    k, v, k_win, v_win, k_raw, v_raw = new_tokens
    to_k, to_v, to_k_win, to_v_win, to_k_raw, to_v_raw, to_k_cmp, to_v_cmp = memory
    cos, sin = factors
    hidden_k, hidden_v = hidden
    units_k, units_v = units
    parts_k, parts_v = parts
    block_table, window_table, raw_table = tables
    (stride_kb, stride_kt, stride_kg, stride_vb, stride_vt, stride_vg,
     stride_kwb, stride_kwt, stride_kwg, stride_vwb, stride_vwt, stride_vwg,
     stride_krb, stride_krt, stride_krg, stride_vrb, stride_vrt, stride_vrg) = new_strides  # fmt: skip
    (stride_tkp, stride_tks, stride_tkg, stride_tvp, stride_tvs, stride_tvg,
     stride_tkwp, stride_tkws, stride_tkwg, stride_tvwp, stride_tvws, stride_tvwg,
     stride_tkrp, stride_tkrs, stride_tkrg, stride_tvrp, stride_tvrs, stride_tvrg,
     stride_tkcp, stride_tkcs, stride_tkcg, stride_tvcp, stride_tvcs, stride_tvcg) = strides  # fmt: skip
    wait_for_last(PDL)
    pid = tl.program_id(0)
    if pid < rows * t:
        row, column = pid // t, pid % t
        length = tl.load(lengths + row)
        new = t
        if HAS_COUNTS:
            new = tl.load(counts + row)
        only_page = tl.load(block_table + wide(row) * pages_per_row)
        # All loads before the first store, so that none waits for another.
        k_token = _token(k, cos, sin, row, column, t, groups, stride_kb, stride_kt, stride_kg, GROUPS, D, DP, ROTATE)
        v_token = _token(v, cos, sin, row, column, t, groups, stride_vb, stride_vt, stride_vg, GROUPS, E, EP, False)
        if HAS_WINDOW:
            k_win_token = _token(
                k_win, cos, sin, row, column, t, groups, stride_kwb, stride_kwt, stride_kwg, GROUPS, D, DP, ROTATE
            )
            v_win_token = _token(
                v_win, cos, sin, row, column, t, groups, stride_vwb, stride_vwt, stride_vwg, GROUPS, E, EP, False
            )
        k_raw_token = _token(
            k_raw, cos, sin, row, column, t, groups, stride_krb, stride_krt, stride_krg, GROUPS, D, DP, False
        )
        v_raw_token = _token(
            v_raw, cos, sin, row, column, t, groups, stride_vrb, stride_vrt, stride_vrg, GROUPS, E, EP, False
        )
        is_last = _arrive(arrivals, tl.num_programs(0))
        let_next_begin(PDL)
        position = length + column - (t - new)
        there = (column >= t - new) & (position < room)
        page, place = page_of(block_table, only_page, row, position, there, pages_per_row, PAGE_TOKENS)
        there &= page >= 0
        _keep(to_k, k_token, page, place, there, groups, stride_tkp, stride_tks, stride_tkg, GROUPS, D, DP)
        _keep(to_v, v_token, page, place, there, groups, stride_tvp, stride_tvs, stride_tvg, GROUPS, E, EP)
        if PAGED:
            # Places of strides that end no block hold nothing, but are loaded; another row may have left NaN there.
            empty = there & ((position + 1) % STRIDE == 0) & (position + 1 < BLOCK)
            place = position // STRIDE
            if PAGE_STRIDES > 0:
                place %= PAGE_STRIDES
            zero = tl.zeros([GROUPS, DP], to_k_cmp.dtype.element_ty)
            _keep(to_k_cmp, zero, page, place, empty, groups, stride_tkcp, stride_tkcs, stride_tkcg, GROUPS, D, DP)
            zero = tl.zeros([GROUPS, EP], to_v_cmp.dtype.element_ty)
            _keep(to_v_cmp, zero, page, place, empty, groups, stride_tvcp, stride_tvcs, stride_tvcg, GROUPS, E, EP)
        if HAS_WINDOW:
            page, slot, held = _ring_of(window_table, row, position, there, window_pages, RING, PAGED)
            _keep(to_k_win, k_win_token, page, slot, held, groups, stride_tkwp, stride_tkws, stride_tkwg, GROUPS, D, DP)
            _keep(to_v_win, v_win_token, page, slot, held, groups, stride_tvwp, stride_tvws, stride_tvwg, GROUPS, E, EP)
        page, slot, held = _ring_of(raw_table, row, position, there, raw_pages, RAW_RING, PAGED)
        _keep(to_k_raw, k_raw_token, page, slot, held, groups, stride_tkrp, stride_tkrs, stride_tkrg, GROUPS, D, DP)
        _keep(to_v_raw, v_raw_token, page, slot, held, groups, stride_tvrp, stride_tvrs, stride_tvrg, GROUPS, E, EP)
    else:
        pid -= rows * t
        tile, part = pid // (parts_k + parts_v), pid % (parts_k + parts_v)
        flat = tile * ROWS + tl.arange(0, ROWS)
        of_row, number, head, of_length, of_new, last, complete = _blocks(
            flat, rows * num_new * groups, lengths, counts, t, groups, num_new, BLOCK, STRIDE, HAS_COUNTS
        )
        is_last = _arrive(arrivals, tl.num_programs(0))
        let_next_begin(PDL)
        if tl.sum(complete.to(tl.int32), 0) > 0:
            if part < parts_k:
                _compress(
                    k_raw, to_k_raw, to_k_cmp, phi_k, factors_cmp, hidden_k, arrivals + 1 + 2 * tile, part, parts_k,
                    block_table, raw_table, flat, of_row, number, head, of_length, of_new, last, complete, t, num_new,
                    pages_per_row, raw_pages, room, units_k, (stride_krb, stride_krt, stride_krg),
                    (stride_tkrp, stride_tkrs, stride_tkrg), (stride_tkcp, stride_tkcs, stride_tkcg),
                    D, DP, BLOCK, STRIDE, RAW_RING, PAGED, PAGE_STRIDES, True, KIND,
                    UNITS, ROWS, WARPS, SLICE_D, INNER, STAGES, PRECISION,
                )  # fmt: skip
            else:
                _compress(
                    v_raw, to_v_raw, to_v_cmp, phi_v, factors_cmp, hidden_v, arrivals + 2 + 2 * tile, part - parts_k,
                    parts_v, block_table, raw_table, flat, of_row, number, head, of_length, of_new, last, complete, t,
                    num_new, pages_per_row, raw_pages, room, units_v, (stride_vrb, stride_vrt, stride_vrg),
                    (stride_tvrp, stride_tvrs, stride_tvrg), (stride_tvcp, stride_tvcs, stride_tvcg),
                    E, EP, BLOCK, STRIDE, RAW_RING, PAGED, PAGE_STRIDES, False, KIND,
                    UNITS, ROWS, WARPS, SLICE_E, INNER, STAGES, PRECISION,
                )  # fmt: skip
    if is_last:
        for first in tl.range(0, rows, 128):
            row_of = first + tl.arange(0, 128)
            mask = row_of < rows
            more = t
            if HAS_COUNTS:
                more = tl.load(counts + row_of, mask=mask, other=0)
            tl.store(lengths + row_of, tl.load(lengths + row_of, mask=mask, other=0) + more, mask=mask)
