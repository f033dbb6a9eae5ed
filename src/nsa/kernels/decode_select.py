"""Scores of the selection blocks of one query, and the top n of them.

The splits left, for each head and block, sums of exp(score - reference) with the tile's reference, side by side: of
the compressed blocks whose last stride lies in the selection block (each times the strides it has there), and of those
that end in the next block, times their strides in this one. With the log-sum-exp over all splits they become
probabilities (eqs. 8 to 10), in fp32.

The n-th largest score is found by a search over the bits: what lies above it is taken, then ties from the lowest index
up; the result comes out ascending. The search starts from a value that n scores are known to reach: the least of the
maxima of NP interleaved subsets.
"""

import triton
import triton.language as tl


@triton.jit
def merge_lse(
    part_top, part_total, first_head, active, parts, SPLITS_PADDED: tl.constexpr, G: tl.constexpr, GP: tl.constexpr
):
    """Log-sum-exp (base 2) [GP] of each head of a query over its splits; +inf where there is no key."""
    head = tl.arange(0, GP)
    split = tl.arange(0, SPLITS_PADDED)[None, :]
    at = (first_head + head)[:, None] * parts + split
    mask = (head < G)[:, None] & (split < active)
    top = tl.load(part_top + at, mask=mask, other=float("-inf"), cache_modifier=".cg")
    total = tl.load(part_total + at, mask=mask, other=0.0, cache_modifier=".cg")
    highest = tl.max(top, 1)
    reference = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(total * tl.exp2(top - reference[:, None]), 1)
    empty = total == 0.0
    lse = tl.where(empty, float("inf"), reference + tl.log2(tl.where(empty, 1.0, total)))
    # Every warp gets them all, so that to pick one later takes no barrier.
    return tl.sum(tl.where(head[:, None] == tl.arange(0, GP)[None, :], lse[:, None], 0.0), 0)


@triton.jit
def _scores(
    sums, tops, lse, first_head, first_tile, end_tile, tiles, num_blocks, num_tiles, TILE_BLOCKS: tl.constexpr,
    SLOTS: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Scores [BLOCKS] of the blocks of the tiles first .. end - 1: probabilities of the group's heads, added in order.

    A head at a time: its few factors are then loaded as the sums need them, and no layout is converted.
    """
    TILES: tl.constexpr = BLOCKS // TILE_BLOCKS
    COLUMNS: tl.constexpr = TILE_BLOCKS * SLOTS
    tile = first_tile + tl.arange(0, TILES)
    column = tl.arange(0, COLUMNS)[None, :]
    there, next_there = tile < end_tile, tile + 1 < tiles
    # What reaches into a tile's last block was written with the next tile, relative to that one's reference.
    is_next = column == COLUMNS - 1
    at = (tile * COLUMNS)[:, None] + column
    total = tl.zeros([TILES, COLUMNS], tl.float32)
    heads = tl.arange(0, GP)
    for head in tl.range(0, G, loop_unroll_factor=8 if G > 8 else G):
        row = first_head + head
        found = tl.load(sums + row * (num_blocks * SLOTS) + at, mask=there[:, None], other=0.0, cache_modifier=".cg")
        top = tl.load(tops + row * num_tiles + tile, mask=there, other=float("-inf"), cache_modifier=".cg")
        row_lse = tl.sum(tl.where(heads == head, lse, 0.0), 0)
        factor = tl.exp2(top - row_lse)[:, None]
        if SLOTS > 1:
            next_top = tl.load(
                tops + row * num_tiles + tile + 1, mask=next_there, other=float("-inf"), cache_modifier=".cg"
            )
            factor = tl.where(is_next, tl.exp2(next_top - row_lse)[:, None], factor)
        total += factor * found
    if SLOTS > 1:
        total = tl.sum(tl.reshape(total, [TILES, TILE_BLOCKS, SLOTS]), 2)
    return tl.reshape(total, [BLOCKS])


@triton.jit
def _take(
    new, old, block, kept, slot, picks, bits, infinite,
    HAS_OLD: tl.constexpr, FORCED: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The n best of the blocks `block` with bits `new`, and of those kept before, into picks and bits.

    So many of all of them are `infinite`.
    """
    # With fewer forced blocks than n, the n-th is no forced one: the search need not go up to infinity.
    INFINITE: tl.constexpr = 0x7F800000
    free = tl.where(new == INFINITE, 0, new) if FORCED < N else new
    highest = tl.max(tl.reshape(free, [BLOCKS // NP, NP]), 0)
    least, ceiling = tl.min(highest, 0), tl.max(highest, 0) + 1
    above = infinite if FORCED < N else infinite * 0
    if HAS_OLD:
        free_old = tl.where(old == INFINITE, 0, old) if FORCED < N else old
        least = tl.maximum(least, tl.min(tl.where(slot < N, free_old, 0x7FFFFFFF), 0))
        ceiling = tl.maximum(ceiling, tl.max(free_old, 0) + 1)
    # The largest value that at least n scores reach, or any that n scores reach: both take the same blocks.
    threshold = tl.maximum(least, 0)
    while ceiling - threshold > 1:
        # At two places at once: a count takes as long as its barriers.
        third = (ceiling - threshold + 2) // 3
        low = threshold + third
        high = tl.minimum(low + third, ceiling - 1)
        reach = tl.sum((new >= low).to(tl.int32) + ((new >= high).to(tl.int32) << 16), 0)
        if HAS_OLD:
            reach += tl.sum((old >= low).to(tl.int32) + ((old >= high).to(tl.int32) << 16), 0)
        reach_low, reach_high = reach & 0xFFFF, reach >> 16
        # n scores reach a value exactly: done, with that value and room for all that equal it.
        exact = (reach_low == N) | (reach_high == N)
        found = tl.where(reach_high >= N, high, low)
        threshold = tl.where(reach_low < N, threshold, found)
        above = tl.where(exact, 0, tl.where(reach_low < N, reach_low, tl.where(reach_high < N, reach_high, above)))
        ceiling = tl.where(reach_low < N, low, tl.where(reach_high < N, high, ceiling))
        ceiling = tl.where(exact, found + 1, ceiling)
    # Count those above it in the low half and those equal to it in the high half, in one scan.
    new_marks = (new > threshold).to(tl.int32) + ((new == threshold).to(tl.int32) << 16)
    before = 0
    room = N - above  # for those equal, from the lowest index up
    if HAS_OLD:
        old_marks = (old > threshold).to(tl.int32) + ((old == threshold).to(tl.int32) << 16)
        before = tl.sum(old_marks, 0)
        rank = tl.cumsum(old_marks, 0)
        taken = (old > threshold) | ((old == threshold) & ((rank >> 16) <= room))
        place = (rank & 0xFFFF) + tl.minimum(rank >> 16, room) - 1
        tl.store(picks + place, kept, mask=taken)
        tl.store(bits + place, old, mask=taken)
    rank = tl.cumsum(new_marks, 0) + before
    taken = (new > threshold) | ((new == threshold) & ((rank >> 16) <= room))
    place = (rank & 0xFFFF) + tl.minimum(rank >> 16, room) - 1
    tl.store(picks + place, block, mask=taken)
    tl.store(bits + place, new, mask=taken)


@triton.jit
def _bits(score, block, own_block, INITIAL: tl.constexpr, LOCAL: tl.constexpr):
    """Scores as integers of the same order: infinity for forced blocks and no others, -1 for those after the query's
    own. One that is NaN counts as 0: no sum is larger than infinity, and exactly n blocks are found."""
    forced = (block < INITIAL) | (block > own_block - LOCAL)
    score = tl.where(forced, float("inf"), tl.where(score < float("inf"), score, 0.0))
    return tl.where(block <= own_block, score.to(tl.int32, bitcast=True), -1)


@triton.jit
def select_few(
    sums, tops, part_top, part_total, picks, bits, first_head, active, parts, position, num_blocks, num_tiles,
    STRIDE: tl.constexpr, SELECT: tl.constexpr, PER_BLOCK: tl.constexpr, TILE_BLOCKS: tl.constexpr,
    SLOTS: tl.constexpr, SPLITS_PADDED: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, N: tl.constexpr,
    NP: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The n blocks, ascending, of the query at `position`, which has more than n and at most CHUNK."""
    own_block = position // SELECT
    tiles = tl.cdiv((position + 1) // STRIDE, PER_BLOCK * TILE_BLOCKS)
    lse = merge_lse(part_top, part_total, first_head, active, parts, SPLITS_PADDED, G, GP)
    score = _scores(
        sums, tops, lse, first_head, 0, tiles, tiles, num_blocks, num_tiles, TILE_BLOCKS, SLOTS, G, GP, CHUNK
    )
    block = tl.arange(0, CHUNK)
    new = _bits(score, block, own_block, INITIAL, LOCAL)
    FORCED: tl.constexpr = INITIAL + LOCAL
    _take(new, new, block, block, tl.arange(0, NP), picks, bits, tiles * 0 + FORCED, False, FORCED, N, NP, CHUNK)


@triton.jit
def score_blocks(
    sums, tops, part_top, part_total, scores, first_head, active, parts, first_tile, end_tile, tiles, num_blocks,
    num_tiles, TILE_BLOCKS: tl.constexpr, SLOTS: tl.constexpr, SPLITS_PADDED: tl.constexpr, G: tl.constexpr,
    GP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Scores of the blocks of the tiles first .. end - 1, to their places."""
    lse = merge_lse(part_top, part_total, first_head, active, parts, SPLITS_PADDED, G, GP)
    for first in tl.range(first_tile, end_tile, CHUNK // TILE_BLOCKS):
        score = _scores(
            sums, tops, lse, first_head, first, end_tile, tiles, num_blocks, num_tiles, TILE_BLOCKS, SLOTS, G, GP, CHUNK
        )
        block = first * TILE_BLOCKS + tl.arange(0, CHUNK)
        tl.store(scores + block, score, mask=block < end_tile * TILE_BLOCKS)


@triton.jit
def choose_blocks(
    scores, picks, bits, own_block, end, N: tl.constexpr, NP: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """The n best blocks up to `own_block`, ascending; those from `end` on have no compressed key, and score 0."""
    FORCED: tl.constexpr = INITIAL + LOCAL
    slot = tl.arange(0, NP)
    for first in tl.range(0, own_block + 1, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        score = tl.load(scores + block, mask=block < end, other=0.0, cache_modifier=".cg")
        new = _bits(score, block, own_block, INITIAL, LOCAL)
        # Forced blocks up to here; the first and the last are not the same ones, since there are more than n.
        infinite = INITIAL + tl.maximum(tl.minimum(first + BLOCKS, own_block + 1) - (own_block - LOCAL + 1), 0)
        if first == 0:
            _take(new, new, block, block, slot, picks, bits, infinite, False, FORCED, N, NP, BLOCKS)
        else:
            tl.debug_barrier()
            kept = tl.load(picks + slot, mask=slot < N, other=-1, cache_modifier=".cg")
            old = tl.load(bits + slot, mask=slot < N, other=-1, cache_modifier=".cg")
            tl.debug_barrier()
            _take(new, old, block, kept, slot, picks, bits, infinite, True, FORCED, N, NP, BLOCKS)
