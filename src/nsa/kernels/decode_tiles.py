"""Pieces that the decoding kernels share: how a row's keys are split, queries rotated on loading, waiting for a launch.

A row's keys are cut into splits by its own length alone, so that neither the batch nor the cache's size changes the
order of any sum: up to SPLITS runs of tiles over the compressed keys, then the window in runs of one length.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nsa.kernels.tiles import wide


@triton.jit
def let_next_begin(PDL: tl.constexpr):
    """With programmatic launches the next kernel may begin now; it waits by itself for what this one writes."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait_for_last(PDL: tl.constexpr):
    """What the kernel before this one wrote, and all before that, is there from here on."""
    if PDL:
        gdc_wait()


@triton.jit
def last_position(length, t, first, BLOCK_Q: tl.constexpr):
    """Position of the last query of a tile."""
    return length - t + tl.minimum(first + BLOCK_Q, t) - 1


@triton.jit
def compressed_plan(
    last, STRIDE: tl.constexpr, TILE_STRIDES: tl.constexpr, SPLITS: tl.constexpr, LEAST_TILES: tl.constexpr
):
    """Strides that the query at `last` sees, tiles of them, tiles in a split, splits that have any."""
    strides = tl.maximum(last + 1, 0) // STRIDE
    tiles = tl.cdiv(strides, TILE_STRIDES)
    per_split = tl.maximum(tl.cdiv(tiles, SPLITS), LEAST_TILES)
    return strides, tiles, per_split, tl.cdiv(tiles, per_split)


@triton.jit
def window_plan(length, t, first, last, window, WINDOW_KEYS: tl.constexpr):
    """First position that a tile of queries sees in the window, and splits of it that have any."""
    low = tl.maximum(length - t + first - window + 1, 0)
    return low, tl.cdiv(tl.maximum(last + 1 - low, 0), WINDOW_KEYS)


@triton.jit
def load_queries(
    q, cos, sin, row, column, head, mask, t, stride_qb, stride_qt, stride_qh,
    D: tl.constexpr, DP: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """Queries [rows, DP] of columns and heads [rows]; rotated in fp32 where factors [b, t, D] are given."""
    d = tl.arange(0, DP)
    rows = q + wide(row) * stride_qb + (wide(column) * stride_qt + wide(head) * stride_qh)[:, None]
    inside = mask[:, None] & (d < D)[None, :]
    x = tl.load(rows + d[None, :], mask=inside, other=0.0)
    if ROTATE:
        partner = tl.where(d < D // 2, d + D // 2, d - D // 2)
        y = tl.load(rows + partner[None, :], mask=inside, other=0.0).to(tl.float32)
        y = tl.where((d < D // 2)[None, :], -y, y)
        at = ((wide(row) * t + column) * D)[:, None] + d[None, :]
        c = tl.load(cos + at, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sin + at, mask=inside, other=0.0).to(tl.float32)
        x = (x.to(tl.float32) * c + y * s).to(q.dtype.element_ty)
    return x


@triton.jit
def page_of(block_table, only_page, row, index, mask, pages_per_row, PER_PAGE: tl.constexpr):
    """Page and place of token (or stride) `index` of a row; PER_PAGE 0: the row has one page."""
    if PER_PAGE == 0:
        page = only_page + index * 0
        place = index
    else:
        page = tl.load(block_table + wide(row) * pages_per_row + index // PER_PAGE, mask=mask, other=0)
        place = index % PER_PAGE
    return page.to(tl.int64), place


@triton.jit
def page_rows(
    k, v, block_table, only_page, row, first, inside, there, pages_per_row, stride_kp, stride_vp,
    K_TOKEN: tl.constexpr, V_TOKEN: tl.constexpr, PER_PAGE: tl.constexpr,
):  # fmt: skip
    """Where the keys and values of tokens (or strides) first + inside of a row begin.

    With one page a row only the tile's beginning changes from tile to tile: all else is constant, or added once.
    """
    if PER_PAGE == 0:
        k_rows = k + (wide(only_page) * stride_kp + wide(first) * K_TOKEN) + inside * K_TOKEN
        v_rows = v + (wide(only_page) * stride_vp + wide(first) * V_TOKEN) + inside * V_TOKEN
    else:
        page, place = page_of(block_table, only_page, row, first + inside, there, pages_per_row, PER_PAGE)
        k_rows = k + page * stride_kp + wide(place) * K_TOKEN
        v_rows = v + page * stride_vp + wide(place) * V_TOKEN
    return k_rows, v_rows


@triton.jit
def ring_rows(
    k, v, row, first, inside, stride_kp, stride_vp, K_TOKEN: tl.constexpr, V_TOKEN: tl.constexpr, RING: tl.constexpr
):
    """Where the keys and values of tokens first + inside of a row begin in its rings."""
    slot = first % RING + inside
    slot = tl.where(slot >= RING, slot - RING, slot)
    return k + wide(row) * stride_kp + slot * K_TOKEN, v + wide(row) * stride_vp + slot * V_TOKEN


@triton.jit
def prefetch_rows(rows, there, BYTES: tl.constexpr):
    """Ask for rows of so many bytes to come to L2. A hint: nothing waits for it."""
    LINES: tl.constexpr = triton.next_power_of_2((BYTES + 127) // 128)
    at = tl.arange(0, LINES)[None, :] * 128
    lines = rows.to(tl.int64)[:, None] + at
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.u32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0; }", "=r,l,r",
        [lines, (there[:, None] & (at < BYTES)).to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def attend_tile(acc, totals, top, queries, k, v, visible, scale_log2, PRECISION: tl.constexpr):
    """One tile of keys into the running softmax; also the exponentials, and what they are relative to.

    `totals` [rows, keys of a tile] keeps the sums of the keys with the same place in their tiles, to be added at the
    end: a sum over a tile would pass between the warps.
    """
    scores = tl.dot(queries, tl.trans(k), input_precision=PRECISION)
    scores = tl.where(visible, scores * scale_log2, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    # A row that has seen nothing: not -inf - -inf.
    reference = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(scores - reference[:, None])
    rescale = tl.exp2(top - reference)
    totals = totals * rescale[:, None] + p
    acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
    return acc, totals, new_top, p, reference
