"""Attention over all tokens of the selected blocks (paper, eq. 12).

Three ways to tile the same sum, chosen by size. Gathering n*l' keys for every query costs more memory traffic than
arithmetic, so long sequences go key-block-outer: each block once, against all queries that selected it.
"""

from collections.abc import Callable, Iterator
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nsa.config import NSAConfig
from nsa.ops.tiled_attention import tiled_attention
from nsa.ops.tiles import Mask, Tile, tile_elements
from nsa.shapes import UNIFORM, Part, Sequences, bind
from nsa.streams import Blocks, Stream

Tiling = Literal["by_query", "by_block", "masked"]

# Up to this many queries, gathering each one's blocks is cheapest (decoding); but where everything may be scored, not
# for so many rows and heads.
MAX_QUERIES_TO_GATHER, MAX_GATHERS = 8, 64
# Up to this many times the n*l' keys that a query reads, scoring everything and masking is cheapest.
MAX_CONTEXT_TO_MASK = 4
# Queries that share a mask; more would mostly add keys after the first of them.
MAX_QUERIES_TO_MASK = 128


def selected_attention(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b s g d"],
    v: Float[Tensor, "b s g e"],
    block_indices: Int[Tensor, "b t g n"],
    config: NSAConfig,
    *,
    sequences: Sequences = UNIFORM,
    scale: float | None = None,
    tiling: Tiling | None = None,
) -> tuple[Float[Tensor, "b t h e"], Float[Tensor, "b t h"]]:
    """Attention over the tokens of the selected blocks.

        o_t = Attn(q_t, K, V) over the positions j*l' <= p < (j+1)*l' with p <= t, for the blocks j in I_t

    Args:
        q: queries, the last t of s positions (or as `sequences` says).
        k, v: keys and values of the selection branch; keys carry their rotary position.
        block_indices: I_t per query and KV head, int32 or int64, no repeats, -1 for an empty slot, in any order;
            counted from the start of the query's own sequence.
        config: gives l'.
        sequences: where the sequences lie (nsa.shapes.Sequences).
        scale: factor of the scores, d ** -0.5 by default.
        tiling: how to order the work, by default chosen by size; the meaning is the same.

    Returns:
        out in q's dtype, and lse: natural log, fp32 (fp64 for fp64 inputs). A query with no selected block, or
        whose blocks all lie after it, gives 0 and -inf.

    Raises:
        ValueError: shapes that do not fit, a block index outside the sequence, or an unknown tiling.

    Source: paper eq. 12. Tested against the fp64 brute force of nsa.testing in each tiling.
    """
    bind(
        "selected_attention",
        q=(q, "b t h d"),
        k=(k, "b s g d"),
        v=(v, "b s g e"),
        block_indices=(block_indices, "b t g n"),
    )
    if tiling is not None and tiling not in get_args(Tiling):
        raise ValueError(f"selected_attention: tiling should be one of {get_args(Tiling)}, got {tiling!r}")
    reach = Blocks(block_indices, config.select_block_size, config.num_local_blocks)
    tiles = block_tiles(q, Stream(k, v, where=sequences), reach, tiling=tiling)
    return tiled_attention(q, k, v, tiles, scale=scale)


def block_tiles(
    q: Tensor, stream: Stream, reach: Blocks, *, tiling: Tiling | None = None
) -> Callable[[], Iterator[Tile]]:
    """In the order of work that is cheapest for each part, or in one way for all."""
    (b, t, h, _), (_, s, g, _), size = q.shape, stream.k.shape, reach.size

    def tiles() -> Iterator[Tile]:
        for part in stream.where.parts(None, b, t, s):
            if part.num_queries == 0 or part.num_keys == 0:
                continue
            blocks = -(-part.num_keys // size)
            queries = slice(part.q_start, part.q_start + part.num_queries)
            chosen = reach.indices[part.rows, queries].transpose(1, 2).long()  # [rows, g, t, n]
            if int(chosen.max()) >= blocks or int(chosen.min()) < -1:
                raise ValueError(
                    f"selected_attention: block indices should lie between -1 and {blocks - 1} "
                    f"({part.num_keys} keys), got {int(chosen.min())} to {int(chosen.max())}"
                )
            way = tiling or _cheapest(part, chosen.shape, size)
            if way == "by_query":
                yield from _tiles_by_query(part, chosen, size)
            elif way == "by_block":
                yield from _tiles_by_block(part, chosen, reach, h // g)
            else:
                yield from _tiles_masked(part, chosen, size, blocks, h)

    return tiles


def _cheapest(part: Part, shape: torch.Size, size: int) -> Tiling:
    """Of lists of blocks of this shape [rows, g, t, n]."""
    rows, groups, t, n = shape
    can_mask = part.num_keys <= MAX_CONTEXT_TO_MASK * n * size
    if t <= MAX_QUERIES_TO_GATHER and not (can_mask and rows * groups * t > MAX_GATHERS):
        return "by_query"
    return "masked" if can_mask else "by_block"


def _tiles_by_query(part: Part, chosen: Tensor, size: int) -> Iterator[Tile]:
    """Each query against its own keys, gathered."""
    rows, groups, _, _ = chosen.shape
    offsets = torch.arange(size, device=chosen.device)
    for row in range(rows):
        for group in range(groups):
            for query in range(max(0, -part.first_position), part.num_queries):
                blocks = chosen[row, group, query]
                keys = (blocks[blocks >= 0, None] * size + offsets).flatten()
                keys = keys[keys <= part.first_position + query]
                if len(keys):
                    yield Tile(
                        slice(part.rows.start + row, part.rows.start + row + 1),
                        slice(group, group + 1),
                        slice(part.q_start + query, part.q_start + query + 1),
                        part.k_start + keys,
                    )


def _tiles_by_block(part: Part, chosen: Tensor, reach: Blocks, heads: int) -> Iterator[Tile]:
    """Each key block against all queries that selected it, in order, a bounded number at a time."""
    rows, groups, _, n = chosen.shape
    size, blocks = reach.size, -(-part.num_keys // reach.size)
    room = max(1, tile_elements() // (heads * size))
    for row in range(rows):
        row_slice = slice(part.rows.start + row, part.rows.start + row + 1)
        for group in range(groups):
            by_block, order = chosen[row, group].flatten().sort(stable=True)
            queries_by_block = order // n
            bounds = torch.searchsorted(by_block, torch.arange(blocks + 1, device=chosen.device)).tolist()
            for block in range(blocks):
                low, high = block * size, min((block + 1) * size, part.num_keys)
                queries = queries_by_block[bounds[block] : bounds[block + 1]]
                # First the queries that the block is local to, which mostly follow one another, those inside it among
                # them: they see a part of it. Then those far after it.
                end = high + (reach.num_local - 1) * size
                local = int(torch.searchsorted(queries, end - part.first_position))
                for run in (*queries[:local].split(room), *queries[local:].split(room)):
                    if len(run) == 0:
                        continue
                    masks: tuple[Mask, ...] = ()
                    if int(run[0]) + part.first_position < high - 1:
                        seen = torch.arange(low, high, device=run.device) <= run[:, None] + part.first_position
                        masks = (Mask.alike(0, seen),)
                    keys = slice(part.k_start + low, part.k_start + high)
                    yield Tile(row_slice, slice(group, group + 1), _columns(part, run), keys, masks, partial=True)


def _columns(part: Part, run: Tensor) -> slice | Tensor:
    """The columns of queries in ascending order: a slice, which copies nothing, where they follow one another."""
    first, last = part.q_start + int(run[0]), part.q_start + int(run[-1])
    return slice(first, last + 1) if last - first + 1 == len(run) else part.q_start + run


def _tiles_masked(part: Part, chosen: Tensor, size: int, blocks: int, h: int) -> Iterator[Tile]:
    """Runs of neighbouring queries against all keys up to them, under the mask of what each selected."""
    rows, groups, t, _ = chosen.shape
    first = max(0, -part.first_position)
    while first < t:
        room = max(1, tile_elements() // (rows * h * (part.first_position + first + size)))
        last = min(first + min(room, MAX_QUERIES_TO_MASK), t)
        high = part.first_position + last
        selected = torch.zeros(rows, groups, last - first, blocks + 1, device=chosen.device)
        selected.scatter_(-1, chosen[:, :, first:last].where(chosen[:, :, first:last] >= 0, blocks), 1.0)
        positions = torch.arange(first, last, device=chosen.device) + part.first_position
        whole, rest = divmod(high, size)
        masks = [Mask(0, selected[..., :whole], size)] if whole else []
        masks += [Mask(whole * size, selected[..., whole : whole + 1], rest)] if rest else []
        # What lies after a query: only keys from the first query's position on can.
        low = part.first_position + first
        masks += [Mask.alike(low, torch.arange(low, high, device=chosen.device) <= positions[:, None])]
        yield Tile(
            part.rows,
            slice(None),
            slice(part.q_start + first, part.q_start + last),
            slice(part.k_start, part.k_start + high),
            masks=tuple(masks),
            typical_key=positions,  # the own one
        )
        first = last
