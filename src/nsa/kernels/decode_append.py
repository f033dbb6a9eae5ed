"""Appending to a cache: write the new tokens, compress the blocks that they complete, advance the lengths.

append      programs (rows x t): a token's keys and values to their pages and rings, rotated on the way; and, for
            phi = mlp or linear, programs (row tiles, units, k or v): the first layer of the blocks that complete, of 16
            (row, block, head) together, so that the weights are read once for them
compress    programs (row tiles, k or v): the rest of phi, the rotation at the block's first position, the length

A block's tokens are in the ring but for the new ones, which the first launch reads from its arguments. Whether a block
completes is known from the length on the device; programs without one end at once. The lengths are read by all of the
first launch and written by the second.
"""

import triton
import triton.language as tl

from nsa.kernels.decode_tiles import let_next_begin, page_of, wait_for_last
from nsa.kernels.tiles import load_rows, wide


@triton.jit
def _write_token(
    x, cos, sin, memory, page, place, there, row, column, t, groups, stride_xb, stride_xt, stride_xg,
    stride_p, stride_s, stride_g, GROUPS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """A token's heads x [groups, D] to their place."""
    group, d = tl.arange(0, GROUPS), tl.arange(0, DP)
    mask = there & (group < groups)[:, None] & (d < D)[None, :]
    rows = x + wide(row) * stride_xb + wide(column) * stride_xt + (wide(group) * stride_xg)[:, None]
    token = tl.load(rows + d[None, :], mask=mask, other=0.0)
    if ROTATE:
        partner = tl.where(d < D // 2, d + D // 2, d - D // 2)
        y = tl.load(rows + partner[None, :], mask=mask, other=0.0).to(tl.float32)
        y = tl.where((d < D // 2)[None, :], -y, y)
        at = (wide(row) * t + column) * D + d
        c = tl.load(cos + at, mask=d < D, other=0.0).to(tl.float32)[None, :]
        s = tl.load(sin + at, mask=d < D, other=0.0).to(tl.float32)[None, :]
        token = (token.to(tl.float32) * c + y * s).to(memory.dtype.element_ty)
    to = memory + page * stride_p + wide(place) * stride_s + (wide(group) * stride_g)[:, None]
    tl.store(to + d[None, :], token, mask=mask)


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
    x, ring, position_encoding, weight, bias, out, flat, row, head, length, new, last, complete, first_unit, t,
    stride_xb, stride_xt, stride_xg, stride_r, stride_s, stride_g, units,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr, RING: tl.constexpr,
    IS_MLP: tl.constexpr, UNITS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`units` outputs of the blocks' first layer, fp32, to out [flat, units]; activated for the MLP."""
    unit = first_unit + tl.arange(0, UNITS)
    x_rows = x + wide(row) * stride_xb + wide(head) * stride_xg
    ring_rows = ring + wide(row) * stride_r + wide(head) * stride_g
    first = (last + 1) * STRIDE - BLOCK
    acc = tl.zeros([ROWS, UNITS], tl.float32)
    lost = tl.zeros([ROWS, UNITS], tl.float32)
    for step in tl.range(0, BLOCK * (DP // CHUNK), num_stages=STAGES):
        token = step // (DP // CHUNK)
        d = step % (DP // CHUNK) * CHUNK + tl.arange(0, CHUNK)
        position = first + token
        is_new = position >= length
        column = position - length + t - new
        old_row = ring_rows + wide(position % RING) * stride_s
        old = load_rows(old_row[:, None] + d[None, :], complete & ~is_new, d < D, True, D != DP)
        new_row = x_rows + wide(column) * stride_xt
        fresh = load_rows(new_row[:, None] + d[None, :], complete & is_new, d < D, True, D != DP)
        tokens = tl.where(is_new[:, None], fresh, old)
        if IS_MLP:
            encoding = tl.load(position_encoding + token * D + d, mask=d < D, other=0.0).to(tl.float32)
            tokens = (tokens.to(tl.float32) + encoding[None, :]).to(x.dtype.element_ty)
        w = load_rows(
            weight + (wide(unit) * (BLOCK * D) + token * D)[:, None] + d[None, :], unit < units, d < D, True, D != DP
        )
        part = tl.dot(tokens, tl.trans(w.to(tokens.dtype)), input_precision=PRECISION)
        acc, lost = _add(acc, lost, part, PRECISION)
    if IS_MLP:
        acc += tl.load(bias + unit, mask=unit < units, other=0.0).to(tl.float32)[None, :]
        acc = 0.5 * acc * (1.0 + tl.erf(acc * 0.7071067811865476))
    tl.store(out + (wide(flat) * units)[:, None] + unit[None, :], acc, mask=complete[:, None] & (unit < units)[None, :])


@triton.jit
def decode_append_kernel(
    k, v, k_win, v_win, k_raw, v_raw, cos, sin, to_k, to_v, to_k_win, to_v_win, to_k_raw, to_v_raw,
    position_encoding_k, weight_k, bias_k, position_encoding_v, weight_v, bias_v, hidden_k, hidden_v,
    block_table, lengths, counts, before, rows, t, groups, num_new, pages_per_row, units_k, units_v, tiles_k, tiles_v,
    stride_kb, stride_kt, stride_kg, stride_vb, stride_vt, stride_vg,
    stride_kwb, stride_kwt, stride_kwg, stride_vwb, stride_vwt, stride_vwg,
    stride_krb, stride_krt, stride_krg, stride_vrb, stride_vrt, stride_vrg,
    stride_tkp, stride_tks, stride_tkg, stride_tvp, stride_tvs, stride_tvg,
    stride_tkwp, stride_tkws, stride_tkwg, stride_tvwp, stride_tvws, stride_tvwg,
    stride_tkrp, stride_tkrs, stride_tkrg, stride_tvrp, stride_tvrs, stride_tvrg,
    GROUPS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr, PAGE_TOKENS: tl.constexpr, PAGE_SIZE: tl.constexpr,
    RING: tl.constexpr, RAW_RING: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_LAYER: tl.constexpr,
    IS_MLP: tl.constexpr, ROTATE: tl.constexpr, HAS_COUNTS: tl.constexpr, UNITS: tl.constexpr, ROWS: tl.constexpr,
    CHUNK_D: tl.constexpr, CHUNK_E: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_begin(PDL)
    wait_for_last(PDL)
    pid = tl.program_id(0)
    if pid < rows * t:
        row, column = pid // t, pid % t
        length = tl.load(lengths + row)
        new = t
        if HAS_COUNTS:
            new = tl.load(counts + row)
        if column == 0:
            tl.store(before + row, length)
        position = length + column - (t - new)
        there = (column >= t - new) & (position < pages_per_row * PAGE_SIZE)
        only_page = tl.load(block_table + wide(row) * pages_per_row)
        page, place = page_of(block_table, only_page, row, position, there, pages_per_row, PAGE_TOKENS)
        there &= page >= 0
        _write_token(
            k, cos, sin, to_k, page, place, there, row, column, t, groups, stride_kb, stride_kt, stride_kg,
            stride_tkp, stride_tks, stride_tkg, GROUPS, D, DP, ROTATE,
        )  # fmt: skip
        _write_token(
            v, cos, sin, to_v, page, place, there, row, column, t, groups, stride_vb, stride_vt, stride_vg,
            stride_tvp, stride_tvs, stride_tvg, GROUPS, E, EP, False,
        )  # fmt: skip
        if HAS_WINDOW:
            _write_token(
                k_win, cos, sin, to_k_win, wide(row), position % RING, there, row, column, t, groups,
                stride_kwb, stride_kwt, stride_kwg, stride_tkwp, stride_tkws, stride_tkwg, GROUPS, D, DP, ROTATE,
            )  # fmt: skip
            _write_token(
                v_win, cos, sin, to_v_win, wide(row), position % RING, there, row, column, t, groups,
                stride_vwb, stride_vwt, stride_vwg, stride_tvwp, stride_tvws, stride_tvwg, GROUPS, E, EP, False,
            )  # fmt: skip
        _write_token(
            k_raw, cos, sin, to_k_raw, wide(row), position % RAW_RING, there, row, column, t, groups,
            stride_krb, stride_krt, stride_krg, stride_tkrp, stride_tkrs, stride_tkrg, GROUPS, D, DP, False,
        )  # fmt: skip
        _write_token(
            v_raw, cos, sin, to_v_raw, wide(row), position % RAW_RING, there, row, column, t, groups,
            stride_vrb, stride_vrt, stride_vrg, stride_tvrp, stride_tvrs, stride_tvrg, GROUPS, E, EP, False,
        )  # fmt: skip
    elif HAS_LAYER:
        pid -= rows * t
        tile, unit_tile = pid // (tiles_k + tiles_v), pid % (tiles_k + tiles_v)
        flat = tile * ROWS + tl.arange(0, ROWS)
        of_row, _, of_head, of_length, of_new, last, complete = _blocks(
            flat, rows * num_new * groups, lengths, counts, t, groups, num_new, BLOCK, STRIDE, HAS_COUNTS
        )
        if tl.sum(complete.to(tl.int32), 0) > 0:
            if unit_tile < tiles_k:
                _first_layer(
                    k_raw, to_k_raw, position_encoding_k, weight_k, bias_k, hidden_k, flat, of_row, of_head,
                    of_length, of_new, last, complete, unit_tile * UNITS, t, stride_krb, stride_krt, stride_krg,
                    stride_tkrp, stride_tkrs, stride_tkrg, units_k,
                    D, DP, BLOCK, STRIDE, RAW_RING, IS_MLP, UNITS, ROWS, CHUNK_D, STAGES, PRECISION,
                )  # fmt: skip
            else:
                _first_layer(
                    v_raw, to_v_raw, position_encoding_v, weight_v, bias_v, hidden_v, flat, of_row, of_head,
                    of_length, of_new, last, complete, (unit_tile - tiles_k) * UNITS, t,
                    stride_vrb, stride_vrt, stride_vrg, stride_tvrp, stride_tvrs, stride_tvrg, units_v,
                    E, EP, BLOCK, STRIDE, RAW_RING, IS_MLP, UNITS, ROWS, CHUNK_E, STAGES, PRECISION,
                )  # fmt: skip


@triton.jit
def _phi_columns(
    ring, hidden, weight, bias, flat, row, head, last, complete, column, units,
    stride_r, stride_s, stride_g, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr,
    RING: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """phi of the blocks, fp32 [rows, DP]: the outputs numbered `column`, in any order."""
    mask = complete[:, None] & (column < D)[None, :]
    if KIND == 1:
        return tl.load(hidden + (wide(flat) * D)[:, None] + column[None, :], mask=mask, other=0.0)
    rows = ring + wide(row) * stride_r + wide(head) * stride_g
    first = (last + 1) * STRIDE - BLOCK
    result = tl.zeros([ROWS, DP], tl.float32)
    for token in tl.range(0, BLOCK, loop_unroll_factor=4):
        at = rows + wide((first + token) % RING) * stride_s
        result += tl.load(at[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
    result = result / BLOCK
    if KIND == 2:
        acc = tl.zeros([ROWS, DP], tl.float32)
        lost = tl.zeros([ROWS, DP], tl.float32)
        for start in tl.range(0, units, UNITS):
            unit = start + tl.arange(0, UNITS)
            h = tl.load(
                hidden + (wide(flat) * units)[:, None] + unit[None, :],
                mask=complete[:, None] & (unit < units)[None, :],
                other=0.0,
            )
            w = tl.load(
                weight + column[:, None] * units + unit[None, :],
                mask=(column < D)[:, None] & (unit < units)[None, :],
                other=0.0,
            ).to(ring.dtype.element_ty)
            acc, lost = _add(acc, lost, tl.dot(h.to(w.dtype), tl.trans(w), input_precision=PRECISION), PRECISION)
        result += acc + tl.load(bias + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
    return result


@triton.jit
def decode_compress_kernel(
    k_raw, v_raw, hidden_k, hidden_v, weight_k, bias_k, weight_v, bias_v, cos, sin, k_cmp, v_cmp,
    block_table, lengths, counts, before, rows, t, groups, num_new, pages_per_row, units_k, units_v,
    stride_krp, stride_krs, stride_krg, stride_vrp, stride_vrs, stride_vrg,
    stride_kcp, stride_kcs, stride_kcg, stride_vcp, stride_vcs, stride_vcg,
    D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr,
    PAGE_STRIDES: tl.constexpr, PAGE_SIZE: tl.constexpr, RAW_RING: tl.constexpr, KIND: tl.constexpr,
    HAS_COUNTS: tl.constexpr, UNITS: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_begin(PDL)
    wait_for_last(PDL)
    flat = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = rows * num_new * groups
    row, number, head, length, new, last, complete = _blocks(
        flat, total, before, counts, t, groups, num_new, BLOCK, STRIDE, HAS_COUNTS
    )
    is_k = tl.program_id(1) == 0
    tl.store(lengths + row, length + new, mask=(flat < total) & (number == 0) & (head == 0) & is_k)
    if tl.sum(complete.to(tl.int32), 0) > 0:
        complete &= last < pages_per_row * (PAGE_SIZE // STRIDE)
        only_page = tl.load(block_table + wide(row) * pages_per_row, mask=complete, other=0)
        page, place = page_of(block_table, only_page, row, last, complete, pages_per_row, PAGE_STRIDES)
        complete &= page >= 0
        if is_k:
            d = tl.arange(0, DP)
            partner = tl.where(d < D // 2, d + D // 2, d - D // 2)
            x = _phi_columns(
                k_raw, hidden_k, weight_k, bias_k, flat, row, head, last, complete, d, units_k,
                stride_krp, stride_krs, stride_krg, D, DP, BLOCK, STRIDE, RAW_RING, KIND, ROWS, UNITS, PRECISION,
            )  # fmt: skip
            y = _phi_columns(
                k_raw, hidden_k, weight_k, bias_k, flat, row, head, last, complete, partner, units_k,
                stride_krp, stride_krs, stride_krg, D, DP, BLOCK, STRIDE, RAW_RING, KIND, ROWS, UNITS, PRECISION,
            )  # fmt: skip
            mask_d = complete[:, None] & (d < D)[None, :]
            at = ((wide(row) * num_new + number) * D)[:, None] + d[None, :]
            c = tl.load(cos + at, mask=mask_d, other=0.0).to(tl.float32)
            s = tl.load(sin + at, mask=mask_d, other=0.0).to(tl.float32)
            x = x * c + tl.where((d < D // 2)[None, :], -y, y) * s
            to = k_cmp + page * stride_kcp + wide(place) * stride_kcs + wide(head) * stride_kcg
            tl.store(to[:, None] + d[None, :], x.to(k_cmp.dtype.element_ty), mask=mask_d)
        else:
            e = tl.arange(0, EP)
            values = _phi_columns(
                v_raw, hidden_v, weight_v, bias_v, flat, row, head, last, complete, e, units_v,
                stride_vrp, stride_vrs, stride_vrg, E, EP, BLOCK, STRIDE, RAW_RING, KIND, ROWS, UNITS, PRECISION,
            )  # fmt: skip
            v_to = v_cmp + page * stride_vcp + wide(place) * stride_vcs + wide(head) * stride_vcg
            mask_e = complete[:, None] & (e < E)[None, :]
            tl.store(v_to[:, None] + e[None, :], values.to(v_cmp.dtype.element_ty), mask=mask_e)
