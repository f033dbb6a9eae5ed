"""Top n of the block scores of one query, by the program that was the last to finish its share of the compressed keys.

The splits left, for each head and block, sums of exp(score - reference) with the tile's reference: `own`, of the
compressed blocks whose last stride lies in the selection block (each times the strides it has there), and `spill`, of
the same compressed blocks' strides in the block before. With the log-sum-exp over all splits they become
probabilities (eqs. 8 to 10), in fp32.

The n-th largest score is found by bisection of the bits, as in selection.py: what lies above it is taken, then ties
from the lowest index up; the result comes out ascending. The bisection starts from a value that n scores are known to
reach: the least of the maxima of NP interleaved subsets.
"""

import triton
import triton.language as tl


@triton.jit
def _sum_heads(
    own, spill, tops, lse, first_head, tiles, num_blocks, num_tiles,
    TILE_BLOCKS: tl.constexpr, HAS_SPILL: tl.constexpr, G: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Probabilities of the group's heads, added in order; left where those of the first head were.

    A head at a time: its few factors are then loaded as the sums need them, and no layout is converted.
    """
    TILES: tl.constexpr = BLOCKS // TILE_BLOCKS
    for first in tl.range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        there = tile < tiles
        block = (tile * TILE_BLOCKS)[:, None] + tl.arange(0, TILE_BLOCKS)[None, :]
        own_sum = tl.zeros([TILES, TILE_BLOCKS], tl.float32)
        spill_sum = tl.zeros([TILES, TILE_BLOCKS], tl.float32)
        for head in tl.range(0, G, loop_unroll_factor=8):
            row = first_head + head
            row_lse = tl.load(lse + row, cache_modifier=".cg")
            top = tl.load(tops + row * num_tiles + tile, mask=there, other=float("-inf"), cache_modifier=".cg")
            factor = tl.exp2(top - row_lse)[:, None]
            at = row * num_blocks + block
            own_sum += factor * tl.load(own + at, mask=there[:, None], other=0.0, cache_modifier=".cg")
            if HAS_SPILL:
                spill_sum += factor * tl.load(spill + at, mask=there[:, None], other=0.0, cache_modifier=".cg")
        tl.debug_barrier()
        at = first_head * num_blocks + block
        tl.store(own + at, own_sum, mask=there[:, None])
        if HAS_SPILL:
            tl.store(spill + at, spill_sum, mask=there[:, None])
    tl.debug_barrier()


@triton.jit
def _take(
    new, old, block, kept, kept_bits, slot, picks, bits, own_block,
    HAS_OLD: tl.constexpr, FORCED: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The n best of the blocks `block` with bits `new`, and of those kept before, into picks and bits."""
    least = tl.min(tl.max(tl.reshape(new, [BLOCKS // NP, NP]), 0), 0)
    # With fewer forced blocks than n, the n-th is no forced one: the search need not go up to infinity.
    INFINITE: tl.constexpr = 0x7F800000
    free = tl.where(new == INFINITE, 0, new) if FORCED < N else new
    ceiling = tl.max(free, 0) + 1
    if HAS_OLD:
        least = tl.maximum(least, tl.min(tl.where(slot < N, old, 0x7FFFFFFF), 0))
        free_old = tl.where(old == INFINITE, 0, old) if FORCED < N else old
        ceiling = tl.maximum(ceiling, tl.max(free_old, 0) + 1)
    # The largest value that at least n scores reach, or any that n scores reach: both take the same blocks.
    threshold = tl.maximum(least, 0)
    while ceiling - threshold > 1:
        middle = threshold + (ceiling - threshold) // 2
        reach = tl.sum((new >= middle).to(tl.int32), 0)
        if HAS_OLD:
            reach += tl.sum((old >= middle).to(tl.int32), 0)
        ceiling = tl.where(reach < N, middle, tl.where(reach == N, middle + 1, ceiling))
        threshold = tl.where(reach < N, threshold, middle)
    # Count those above it in the low half and those equal to it in the high half, in one scan.
    new_marks = (new > threshold).to(tl.int32) + ((new == threshold).to(tl.int32) << 16)
    total = tl.sum(new_marks, 0)
    before = 0
    if HAS_OLD:
        old_marks = (old > threshold).to(tl.int32) + ((old == threshold).to(tl.int32) << 16)
        before = tl.sum(old_marks, 0)
        total += before
    room = N - (total & 0xFFFF)  # for those equal, from the lowest index up
    if HAS_OLD:
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
def select_blocks(
    own, spill, tops, lse, picks, bits, head_row, pick_row, position, strides, num_blocks, num_tiles,
    SELECT: tl.constexpr, PER_BLOCK: tl.constexpr, TILE_BLOCKS: tl.constexpr, HAS_SPILL: tl.constexpr,
    G: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """The n blocks of the query at `position`, which has more than n: picks [NP of it], ascending."""
    own_block = position // SELECT
    FORCED: tl.constexpr = INITIAL + LOCAL
    _sum_heads(
        own, spill, tops, lse, head_row, tl.cdiv(strides, PER_BLOCK * TILE_BLOCKS), num_blocks, num_tiles,
        TILE_BLOCKS, HAS_SPILL, G, BLOCKS,
    )  # fmt: skip
    # The last block that a compressed block ends in. A block after it is the query's own, which is forced.
    last_block = tl.cdiv(strides, PER_BLOCK) - 1
    own += head_row * num_blocks
    spill += head_row * num_blocks
    slot = tl.arange(0, NP)
    picks += pick_row * NP
    bits += pick_row * NP
    for first in tl.range(0, own_block + 1, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        score = tl.load(own + block, mask=block <= last_block, other=0.0, cache_modifier=".cg")
        if HAS_SPILL:
            score += tl.load(spill + block + 1, mask=block < last_block, other=0.0, cache_modifier=".cg")
        forced = (block < INITIAL) | (block > own_block - LOCAL)
        score = tl.where(forced, float("inf"), score)
        new = tl.where(block <= own_block, score.to(tl.int32, bitcast=True), -1)
        if first == 0:
            _take(new, new, block, block, new, slot, picks, bits, own_block, False, FORCED, N, NP, BLOCKS)
        else:
            tl.debug_barrier()
            kept = tl.load(picks + slot, mask=slot < N, other=-1, cache_modifier=".cg")
            old = tl.load(bits + slot, mask=slot < N, other=-1, cache_modifier=".cg")
            tl.debug_barrier()
            _take(new, old, block, kept, old, slot, picks, bits, own_block, True, FORCED, N, NP, BLOCKS)
    tl.debug_barrier()


@triton.jit
def merge_lse(
    part_top, part_total, lse, first_head, active, ALL: tl.constexpr, SPLITS_PADDED: tl.constexpr,
    G: tl.constexpr, GP: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp (base 2) of each head of a query over its splits, stored; +inf where there is no key."""
    head = tl.arange(0, GP)
    split = tl.arange(0, SPLITS_PADDED)[None, :]
    at = (first_head + head)[:, None] * ALL + split
    mask = (head < G)[:, None] & (split < active)
    top = tl.load(part_top + at, mask=mask, other=float("-inf"), cache_modifier=".cg")
    total = tl.load(part_total + at, mask=mask, other=0.0, cache_modifier=".cg")
    highest = tl.max(top, 1)
    reference = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(total * tl.exp2(top - reference[:, None]), 1)
    empty = total == 0.0
    found = tl.where(empty, float("inf"), reference + tl.log2(tl.where(empty, 1.0, total)))
    tl.store(lse + first_head + head, found, mask=head < G)
    tl.debug_barrier()
