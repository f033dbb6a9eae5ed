"""Which queries selected a block: the inverse of block_indices, in lists cut into work items.

keys        grid (picks): the segment (KV head, block of the batch) of each pick, ordered so that queries ascend
            within a segment; then the library's stable sort
segments    grid (picks, or segments): the sorted picks; where each segment's list begins, and its work items

Lists come in order, so that sums over them repeat bit by bit. Work items are numbered by a counter, in whatever order
programs come; those of one segment lie side by side and in order, which is all that sums see of it.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.config import NSAConfig
from nsa.kernels.integers import cdiv, next_power_of_2
from nsa.kernels.layout import PACKED, Layout
from nsa.kernels.start import start_kernel

# Work items are to be many times the programs that run at once, and not so many that their sums weigh.
QUERIES_PER_ITEM = (128, 2048)
WORK_ITEMS = 4096
PICKS = 512  # in a program
SEGMENTS = 32


@dataclass(frozen=True)
class InverseIndex:
    """For each segment (KV head, block of the batch): its picks, queries ascending, cut into work items."""

    picks: Tensor  # int32, by segment: query (counted over the batch) * n + slot
    segment_start: Tensor  # int32 [segments + 1]: into picks
    item_start: Tensor  # int32 [segments + 1]: into the work items; the last is their number
    item_segment: Tensor  # int32 [items]
    per_item: int  # picks in a work item, at most
    items: int  # a bound, known without asking the device
    blocks: int  # of the whole batch, a bound too
    block_sequence: Tensor | None  # packed: int32 [blocks]
    block_start: Tensor | None  # packed: first block of each sequence, int32 [sequences + 1]


@triton.jit(do_not_specialize=["picks", "queries", "num_queries", "blocks", "blocks_of_row", "segments"])
def pick_segments_kernel(
    block_indices, keys, item_start, token_sequence, block_start, picks, queries, num_queries, blocks, blocks_of_row,
    segments, GROUPS: tl.constexpr, N: tl.constexpr, LAYOUT: tl.constexpr, PICKS: tl.constexpr,
):  # fmt: skip
    """Picks are [KV head, query, slot] here, as they are to be sorted; empty slots go last."""
    pick = tl.program_id(0) * PICKS + tl.arange(0, PICKS)
    exists = pick < picks
    flat = pick // N % queries
    group = pick // N // queries
    at = (flat.to(tl.int64) * GROUPS + group) * N + pick % N
    block = tl.load(block_indices + at, mask=exists, other=-1).to(tl.int32)
    if LAYOUT == 1:
        sequence = tl.load(token_sequence + flat, mask=exists, other=0)
        first_block = tl.load(block_start + sequence, mask=exists, other=0)
    else:
        first_block = flat // num_queries * blocks_of_row
    tl.store(keys + pick, tl.where(block >= 0, group * blocks + first_block + block, segments), mask=exists)
    if tl.program_id(0) == 0:
        tl.store(item_start + segments, 0)  # the counter of work items


@triton.jit(do_not_specialize=["picks", "picks_of_head", "segments", "per_item", "steps"])
def segments_kernel(
    ordered, order, listed, segment_start, item_start, item_segment, picks, picks_of_head, segments, per_item, steps,
    PICKS: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    pick = tl.program_id(0) * PICKS + tl.arange(0, PICKS)
    exists = pick < picks
    place = tl.load(order + pick, mask=exists, other=0).to(tl.int32)
    tl.store(listed + pick, place % picks_of_head, mask=exists)

    segment = tl.program_id(0) * SEGMENTS + tl.arange(0, SEGMENTS)
    mask = segment < segments
    # Where picks of this segment begin, and of the next: two searches side by side, each step halves both.
    low, high = tl.zeros([SEGMENTS], tl.int32), tl.zeros([SEGMENTS], tl.int32) + picks
    next_low, next_high = low, high
    for _ in tl.range(0, steps):
        middle, next_middle = (low + high) // 2, (next_low + next_high) // 2
        is_open, next_is_open = low < high, next_low < next_high
        before = tl.load(ordered + middle, mask=mask & is_open, other=0) < segment
        next_before = tl.load(ordered + next_middle, mask=mask & next_is_open, other=0) <= segment
        low = tl.where(is_open & before, middle + 1, low)
        high = tl.where(is_open & ~before, middle, high)
        next_low = tl.where(next_is_open & next_before, next_middle + 1, next_low)
        next_high = tl.where(next_is_open & ~next_before, next_middle, next_high)
    tl.store(segment_start + segment, low, mask=mask)
    tl.store(segment_start + segment + 1, next_low, mask=segment == segments - 1)
    items = tl.where(mask, (next_low - low + (per_item - 1)) // per_item, 0)
    first = tl.cumsum(items, 0) - items
    first += tl.atomic_add(item_start + segments, tl.sum(items, 0), sem="relaxed")
    tl.store(item_start + segment, first, mask=mask)
    for i in tl.range(0, tl.max(items, 0)):
        tl.store(item_segment + first + i, segment, mask=i < items)


def invert(block_indices: Tensor, layout: Layout, config: NSAConfig, work_items: int = WORK_ITEMS) -> InverseIndex:
    """Of block_indices [b, t, g, n], which has at least one pick."""
    block_indices = block_indices.contiguous()
    b, t, g, n = block_indices.shape
    picks, device = block_indices.numel(), block_indices.device
    token_sequence = block_sequence = block_start = None
    blocks = b * config.num_selection_blocks(layout.s)
    if layout.kind == PACKED:
        block_map = layout.key_tiles(layout.s, config.select_block_size)
        blocks, block_sequence, block_start = block_map.count, block_map.sequence, block_map.first
        token_sequence = layout.query_tiles(1).sequence
    segments = g * blocks
    few, many = QUERIES_PER_ITEM
    per_item = min(max(next_power_of_2(picks // work_items), few), many)
    items = cdiv(picks, per_item) + min(segments, picks)
    keys, segment_start, item_start, item_segment = (
        torch.empty(size, dtype=torch.int32, device=device) for size in (picks, segments + 1, segments + 1, items)
    )
    programs = cdiv(picks, PICKS)
    start_kernel(
        pick_segments_kernel, (programs,),
        block_indices, keys, item_start, token_sequence, block_start, picks, b * t, t, blocks, blocks // b, segments,
        GROUPS=g, N=n, LAYOUT=layout.kind, PICKS=PICKS, num_warps=4,
    )  # fmt: skip
    ordered, order = keys.sort(stable=True)
    listed = keys  # what was sorted is needed no longer
    start_kernel(
        segments_kernel, (max(programs, cdiv(segments, SEGMENTS)),),
        ordered, order, listed, segment_start, item_start, item_segment, picks, b * t * n, segments, per_item,
        picks.bit_length(), PICKS=PICKS, SEGMENTS=SEGMENTS, num_warps=4,
    )  # fmt: skip
    return InverseIndex(
        listed, segment_start, item_start, item_segment, per_item, items, blocks, block_sequence, block_start
    )
