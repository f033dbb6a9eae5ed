"""The distinct blocks that a tile of neighbouring queries selected, each with a bit for every query that did.

Grid (query tiles, KV heads, rows). Attending block by block over the union loads a block once for all queries of the
tile; how much that saves is up to the data. Blocks that end at or before the first query come first, for they need no
causal mask; otherwise the list keeps the order in which the queries name the blocks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.kernels.integers import next_power_of_2
from nsa.kernels.layout import Layout, TileMap
from nsa.kernels.start import start_kernel
from nsa.kernels.tiles import locate


@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def union_kernel(
    indices, items, counts, cu_q, cu_k, key_start, lengths, tile_sequence, tile_first, num_queries, num_keys,
    N: tl.constexpr, NP: tl.constexpr, STEP: tl.constexpr, SELECT: tl.constexpr,
    LAYOUT: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    pid, group, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    groups = tl.num_programs(1)
    tile, q_start, t, s, _ = locate(
        pid, row, cu_q, cu_k, key_start, lengths, tile_sequence, tile_first, num_queries, num_keys, LAYOUT
    )
    first = tile * BLOCK_Q
    out = (row.to(tl.int64) * tl.num_programs(0) + pid) * groups + group
    if first >= t:
        tl.store(counts + 2 * out, 0)
        tl.store(counts + 2 * out + 1, 0)
        return
    rows = indices + ((row.to(tl.int64) * num_queries + q_start + first) * groups + group) * N
    element = tl.arange(0, BLOCK_Q * NP)
    query, slot = element // NP, element % NP
    block = tl.load(rows + query * groups * N + slot, mask=(first + query < t) & (slot < N), other=-1)
    bits = tl.zeros([BLOCK_Q * NP], tl.int32)
    earlier = tl.zeros([BLOCK_Q * NP], tl.int32)
    for start in tl.range(0, BLOCK_Q * NP, STEP):
        other = start + tl.arange(0, STEP)
        other_query, other_slot = other // NP, other % NP
        mask = (first + other_query < t) & (other_slot < N)
        other_block = tl.load(rows + other_query * groups * N + other_slot, mask=mask, other=-2)
        same = (block[:, None] == other_block[None, :]).to(tl.int32)
        bits += tl.sum(same << other_query[None, :], 1)
        earlier += tl.sum(same * (other[None, :] < element[:, None]).to(tl.int32), 1)
    chosen = (block >= 0) & (earlier == 0)
    past = block < tl.maximum(s - t + first + 1, 0) // SELECT
    num_past = tl.sum((chosen & past).to(tl.int32), 0)
    num_chosen = tl.sum(chosen.to(tl.int32), 0)
    # Past ones counted in the low half, the others in the high half, in one scan.
    rank = tl.cumsum(tl.where(chosen, tl.where(past, 1, 1 << 16), 0), 0)
    place = tl.where(past, rank & 0xFFFF, num_past + (rank >> 16)) - 1
    item = (block.to(tl.int64) << 32) | bits.to(tl.int64)
    tl.store(items + out * (BLOCK_Q * N) + place, item, mask=chosen)
    tl.store(counts + 2 * out, num_past)
    tl.store(counts + 2 * out + 1, num_chosen)


def unions(block_indices: Tensor, layout: Layout, tiles: TileMap, block_q: int, select: int) -> tuple[Tensor, Tensor]:
    """items int64 [b, tiles, g, block_q * n] (block << 32 | bits of the queries); how many past ones, and in all."""
    assert block_q <= 31
    assert block_q * next_power_of_2(block_indices.shape[3]) < 1 << 16
    block_indices = block_indices.contiguous()
    _, _, g, n = block_indices.shape
    n_padded = next_power_of_2(n)
    shape = (layout.b, tiles.count, g)
    elements = block_q * n_padded
    step = min(64, elements, max(8, 4096 // elements))  # comparisons at a time: what registers hold
    items = torch.empty((*shape, block_q * n), dtype=torch.int64, device=block_indices.device)
    counts = torch.empty((*shape, 2), dtype=torch.int32, device=block_indices.device)
    start_kernel(
        union_kernel, (tiles.count, g, layout.b),
        block_indices, items, counts, *layout.arguments, tiles.sequence, tiles.first, layout.t, layout.s,
        N=n, NP=n_padded, STEP=step, SELECT=select, LAYOUT=layout.kind, BLOCK_Q=block_q, num_warps=4,
    )  # fmt: skip
    return items, counts
