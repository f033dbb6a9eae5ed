"""Importance of the selection blocks and the top n of them, a chunk of queries at a time.

scoring     grid (query tiles, key tiles, KV heads x rows): the keys of a tile stay, the heads of the group go by, and
            their probabilities add up in registers, so rows are queries and no group size wastes any. A compressed
            block that reaches into the next selection block gives that part to `spill`, so that no program needs its
            neighbour's keys. InfLLM-V2 (MAX) takes the largest of a block's in the place of their overlaps' sum.
top n       grid (queries, KV heads x rows): the n-th largest score is found by bisection (scores are not negative, so
            their bits order as they do), everything above it is taken, then ties from the lowest index up.

The scratch of scores holds a bounded number of queries, never all of them. Scores are fp32 throughout.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.config import NSAConfig
from nsa.kernels import hopper
from nsa.kernels.integers import cdiv, next_power_of_2
from nsa.kernels.launch import Heads, empty, tile_for
from nsa.kernels.layout import PACKED, UNIFORM, Layout
from nsa.kernels.start import start_kernel
from nsa.kernels.tiles import columns, dot_columns, keys_seen, load_columns, locate, log2_lse, wide

# Bytes of scores kept at a time, own and spilled parts together.
SCRATCH_BYTES = 256 << 20
# Blocks that one step of the top n looks at, for short sequences and long.
TOP_BLOCKS = (128, 1024)
TOP_QUERIES, TOP_WARPS = 2, 1


@triton.jit(do_not_specialize=["num_queries", "num_keys", "tile_offset", "num_blocks"])
def scoring_kernel(
    q, k, lse, own, spill, cu_q, cu_k, key_start, lengths, tile_sequence, tile_first, num_queries, num_keys,
    tile_offset, num_blocks, num_groups, scale_log2, stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kg,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DR: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr,
    PER_BLOCK: tl.constexpr, PER_BLOCK_PADDED: tl.constexpr, MAX: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    group, row = wide(tl.program_id(2) % num_groups), tl.program_id(2) // num_groups
    tile, q_start, t, s, k_start = locate(
        tl.program_id(0) + tile_offset, row, cu_q, cu_k, key_start, lengths, tile_sequence, tile_first,
        num_queries, num_keys, LAYOUT,
    )  # fmt: skip
    first = tile * BLOCK_Q
    if first >= t:
        return
    last = tl.minimum(first + BLOCK_Q, t) - 1
    BLOCKS: tl.constexpr = BLOCK_N // PER_BLOCK_PADDED
    first_block = tl.program_id(1) * BLOCKS
    # Columns are [selection block, compressed block that starts in it], the second padded to a power of two.
    in_tile = tl.arange(0, BLOCK_N)
    inside = in_tile % PER_BLOCK_PADDED
    keys = (first_block + in_tile // PER_BLOCK_PADDED) * PER_BLOCK + inside
    high_last = keys_seen(s - t + last, BLOCK, STRIDE)
    if first_block * PER_BLOCK >= high_last:
        return
    rows = tl.arange(0, BLOCK_Q)
    column = first + rows
    row_mask = column < t
    key_mask = (keys < high_last) & (inside < PER_BLOCK)
    k_rows = k + row.to(tl.int64) * stride_kb + k_start.to(tl.int64) * stride_ks + group * stride_kg
    k_rows += (first_block * PER_BLOCK).to(tl.int64) * stride_ks
    from_first = (in_tile // PER_BLOCK_PADDED) * PER_BLOCK + inside
    k_tile = load_columns(columns(k_rows + from_first[:, None] * stride_ks, DP, DR), 0, key_mask, True, D, DP, DR)

    heads = num_groups * G
    q_rows = q + row.to(tl.int64) * stride_qb + (q_start + first).to(tl.int64) * stride_qt + group * G * stride_qh
    q_tile = columns(q_rows + rows[:, None] * stride_qt, DP, DR)
    lse_rows = lse + (row.to(tl.int64) * num_queries + q_start + first) * heads + group * G + rows * heads
    p_sum = tl.zeros([BLOCK_Q, BLOCK_N], tl.float32)
    next_lse = tl.load(lse_rows, mask=row_mask, other=float("-inf"))
    for head in tl.range(0, G):
        queries = load_columns(q_tile, wide(head) * stride_qh, row_mask, True, D, DP, DR)
        # Loaded an iteration ahead: no product waits for it.
        row_lse = next_lse
        next_lse = tl.load(lse_rows + head + 1, mask=row_mask & (head < G - 1), other=float("-inf"))
        scores = dot_columns(queries, k_tile, DR, PRECISION)
        p_sum += tl.exp2(scores * scale_log2 - log2_lse(row_lse)[:, None])
    high = keys_seen(s - t + column, BLOCK, STRIDE)
    visible = (keys[None, :] < high[:, None]) & (inside < PER_BLOCK)[None, :]
    p_sum = tl.where(visible, p_sum, 0.0)

    # Overlap of the compressed block with its own selection block, in strides; the rest lies in the next one.
    overlap = tl.minimum(BLOCK // STRIDE, PER_BLOCK - inside)
    if MAX:
        p_sum = tl.where(p_sum == p_sum, p_sum, 0.0)
        own_score = tl.max(tl.reshape(p_sum, [BLOCK_Q, BLOCKS, PER_BLOCK_PADDED]), 2)
    else:
        own_score = tl.sum(tl.reshape(p_sum * overlap[None, :].to(tl.float32), [BLOCK_Q, BLOCKS, PER_BLOCK_PADDED]), 2)
    block = first_block + tl.arange(0, BLOCKS)
    scratch_row = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * BLOCK_Q * num_blocks
    out = scratch_row + rows[:, None] * num_blocks + block[None, :]
    mask = row_mask[:, None] & (block < num_blocks)[None, :]
    tl.store(own + out, own_score, mask=mask)
    if BLOCK > STRIDE and MAX:
        reaching = tl.where((overlap < BLOCK // STRIDE)[None, :], p_sum, 0.0)
        tl.store(spill + out, tl.max(tl.reshape(reaching, [BLOCK_Q, BLOCKS, PER_BLOCK_PADDED]), 2), mask=mask)
    elif BLOCK > STRIDE:
        rest = (BLOCK // STRIDE - overlap)[None, :].to(tl.float32)
        tl.store(spill + out, tl.sum(tl.reshape(p_sum * rest, [BLOCK_Q, BLOCKS, PER_BLOCK_PADDED]), 2), mask=mask)


@triton.jit
def _score_bits(
    own, spill, block, mask, own_block, high, PER_BLOCK: tl.constexpr, HAS_SPILL: tl.constexpr, MAX: tl.constexpr,
    INITIAL: tl.constexpr, LOCAL: tl.constexpr,
):  # fmt: skip
    """Scores as integers of the same order; forced blocks are infinite, blocks that may not be selected -1."""
    score = tl.load(own + block, mask=mask & (block * PER_BLOCK < high), other=0.0)
    if HAS_SPILL:
        left = mask & (block > 0) & ((block - 1) * PER_BLOCK < high)
        spilled = tl.load(spill + block - 1, mask=left, other=0.0)
        score = tl.maximum(score, spilled) if MAX else score + spilled
    score = tl.where(score == score, score, 0.0)  # the bits of NaN would go before those of forced blocks
    forced = (block < INITIAL) | (block > own_block - LOCAL)
    score = tl.where(forced, float("inf"), score)
    return tl.where(mask & (block <= own_block), score.to(tl.int32, bitcast=True), -1)


@triton.jit(do_not_specialize=["num_queries", "num_keys", "tile_offset", "num_blocks"])
def top_blocks_kernel(
    own, spill, indices, cu_q, cu_k, key_start, lengths, tile_sequence, tile_first, num_queries, num_keys,
    tile_offset, num_blocks, num_groups, scratch_queries,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr, PER_BLOCK: tl.constexpr, SELECT: tl.constexpr,
    N: tl.constexpr, NP: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr, MAX: tl.constexpr,
    LAYOUT: tl.constexpr, BLOCK_Q: tl.constexpr, QUERIES: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    group, row = wide(tl.program_id(1) % num_groups), tl.program_id(1) // num_groups
    per_tile: tl.constexpr = BLOCK_Q // QUERIES
    tile, q_start, t, s, _ = locate(
        tl.program_id(0) // per_tile + tile_offset, row, cu_q, cu_k, key_start, lengths, tile_sequence, tile_first,
        num_queries, num_keys, LAYOUT,
    )  # fmt: skip
    first = tile * BLOCK_Q + tl.program_id(0) % per_tile * QUERIES
    if first >= t:
        return
    column = first + tl.arange(0, QUERIES)
    row_mask = column < t
    position = s - t + column
    own_block = tl.where((position >= 0) & row_mask, position // SELECT, -1)[:, None]
    high = keys_seen(position, BLOCK, STRIDE)[:, None]
    last_block = tl.maximum(s - t + tl.minimum(first + QUERIES, t) - 1, 0) // SELECT
    scratch_row = tl.program_id(1).to(tl.int64) * scratch_queries + tl.program_id(0) * QUERIES
    scratch = (scratch_row + tl.arange(0, QUERIES)) * num_blocks
    own_rows, spill_rows = own + scratch[:, None], spill + scratch[:, None]
    slot = tl.arange(0, NP)[None, :]
    out_row = (row.to(tl.int64) * num_queries + q_start + column) * num_groups + group
    out_rows = indices + out_row[:, None] * N
    out_mask = row_mask[:, None] & (slot < N)
    kept = tl.full([QUERIES, NP], -1, tl.int32)
    for first_block in tl.range(0, last_block + 1, BLOCKS):
        block = first_block + tl.arange(0, BLOCKS)[None, :]
        new = _score_bits(
            own_rows, spill_rows, block, (block <= last_block) & row_mask[:, None], own_block, high,
            PER_BLOCK, BLOCK > STRIDE, MAX, INITIAL, LOCAL,
        )  # fmt: skip
        old = _score_bits(
            own_rows, spill_rows, kept, kept >= 0, own_block, high, PER_BLOCK, BLOCK > STRIDE, MAX, INITIAL, LOCAL
        )
        # The largest value that at least n scores reach, or any that n scores reach: both take the same blocks.
        threshold = tl.zeros([QUERIES], tl.int32)
        ceiling = tl.maximum(tl.max(new, 1), tl.max(old, 1)) + 1
        while tl.max(ceiling - threshold) > 1:
            middle = threshold + (ceiling - threshold) // 2
            reach = tl.sum((new >= middle[:, None]).to(tl.int32), 1)
            reach += tl.sum((old >= middle[:, None]).to(tl.int32), 1)
            ceiling = tl.where(reach < N, middle, tl.where(reach == N, middle + 1, ceiling))
            threshold = tl.where(reach < N, threshold, middle)
        # Count those above it in the low half and those equal to it in the high half, in one scan.
        edge = threshold[:, None]
        old_marks = (old > edge).to(tl.int32) + ((old == edge).to(tl.int32) << 16)
        new_marks = (new > edge).to(tl.int32) + ((new == edge).to(tl.int32) << 16)
        old_total = tl.sum(old_marks, 1)[:, None]
        total = old_total + tl.sum(new_marks, 1)[:, None]
        room = N - (total & 0xFFFF)  # for those equal, from the lowest index up
        old_rank = tl.cumsum(old_marks, 1)
        new_rank = tl.cumsum(new_marks, 1) + old_total
        taken_old = (old > edge) | ((old == edge) & ((old_rank >> 16) <= room))
        taken_new = (new > edge) | ((new == edge) & ((new_rank >> 16) <= room))
        place_old = (old_rank & 0xFFFF) + tl.minimum(old_rank >> 16, room) - 1
        place_new = (new_rank & 0xFFFF) + tl.minimum(new_rank >> 16, room) - 1
        count = (total & 0xFFFF) + tl.minimum(total >> 16, room)
        tl.store(out_rows + place_old, kept, mask=taken_old)
        tl.store(out_rows + place_new, block + tl.zeros([QUERIES, BLOCKS], tl.int32), mask=taken_new)
        tl.store(out_rows + slot, -1 + tl.zeros([QUERIES, NP], tl.int32), mask=out_mask & (slot >= count))
        tl.debug_barrier()
        kept = tl.load(out_rows + slot, mask=out_mask, other=-1)


def select_top_blocks(
    q: Tensor, k_cmp: Tensor, lse: Tensor, layout: Layout, config: NSAConfig, scale: float, *, by_max: bool = False
) -> Tensor:
    """block_indices int32 [b, t, g, n]: the selection of `nsa.ops.selection`, from the compressed branch's lse.

    `by_max` scores blocks as InfLLM-V2 does (`nsa.ops.pooled_selection`); the lists are n blocks wherever a query is.
    """
    heads = Heads.of(q, k_cmp, k_cmp)
    n = config.num_selected_blocks
    indices = empty(layout, (layout.b, layout.t, heads.g, n), torch.int32, q.device, fill=-1)
    if indices.numel() == 0:
        return indices
    per_block = config.select_block_size // config.compress_stride
    per_block_padded = next_power_of_2(per_block)
    on_hopper = not by_max and hopper.serves_scoring(q, k_cmp, heads, per_block)
    tile = hopper.tile_of(hopper.SCORING, heads, 1) if on_hopper else tile_for("scoring", heads, q)
    block_n = max(tile.block_n, per_block_padded)
    tiles = layout.query_tiles(tile.block_q)
    num_blocks = max(1, config.num_selection_blocks(layout.longest))
    pairs = layout.b * heads.g
    tiles_at_once = max(1, SCRATCH_BYTES // (8 * tile.block_q * num_blocks * pairs))
    tiles_at_once = min(tiles_at_once, tiles.count)
    scratch = torch.empty((2, pairs * tiles_at_once * tile.block_q * num_blocks), dtype=torch.float32, device=q.device)
    own, spill = scratch.unbind(0)
    where = (*layout.arguments, tiles.sequence, tiles.first, layout.t, layout.s)
    common = {
        "BLOCK": layout.block,
        "STRIDE": layout.stride,
        "PER_BLOCK": per_block,
        "MAX": by_max,
        "LAYOUT": layout.kind,
    }
    for offset in range(0, tiles.count, tiles_at_once):
        here = min(tiles_at_once, tiles.count - offset)
        # Tiles of a chunk see no more keys than its last query, where the layout says which that is.
        last = layout.s - layout.t + (offset + here) * tile.block_q
        seen = config.num_compressed_blocks(layout.longest if layout.kind == PACKED else min(last, layout.s))
        if seen > 0:
            key_tiles = cdiv(cdiv(seen, per_block), block_n // per_block_padded)
            if on_hopper:
                hopper.scoring(
                    q,
                    k_cmp,
                    lse,
                    own,
                    spill,
                    layout,
                    tiles,
                    offset,
                    here,
                    key_tiles,
                    num_blocks,
                    heads,
                    per_block,
                    scale,
                )
            else:
                start_kernel(
                    scoring_kernel, (here, key_tiles, pairs),
                    q, k_cmp, lse, own, spill, *where, offset, num_blocks, heads.g, scale * 1.4426950408889634,
                    *q.stride()[:3], *k_cmp.stride()[:3], G=heads.per_group, D=heads.d,
                    DP=heads.split_d[0], DR=heads.split_d[1], PER_BLOCK_PADDED=per_block_padded, **common,
                    **{**tile.constants, "BLOCK_N": block_n},
                )  # fmt: skip
        queries = min(TOP_QUERIES, tile.block_q)
        most = num_blocks if layout.kind != UNIFORM else cdiv(last, config.select_block_size)
        blocks_at_once = min(max(next_power_of_2(most), TOP_BLOCKS[0]), TOP_BLOCKS[1])
        start_kernel(
            top_blocks_kernel, (here * tile.block_q // queries, pairs),
            own, spill, indices, *where, offset, num_blocks, heads.g, here * tile.block_q,
            SELECT=config.select_block_size, N=n, NP=next_power_of_2(n),
            INITIAL=config.num_initial_blocks, LOCAL=config.num_local_blocks, **common,
            BLOCK_Q=tile.block_q, QUERIES=queries, BLOCKS=blocks_at_once, num_warps=TOP_WARPS,
        )  # fmt: skip
    return indices
