"""Attention over the compressed blocks: the first branch, and the coarse view of the whole past."""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from nsa.config import NSAConfig
from nsa.ops.tiled_attention import tiled_attention
from nsa.ops.tiles import Mask, Tile, tile_elements
from nsa.shapes import UNIFORM, Part, Sequences, bind
from nsa.streams import Stream

# More queries in a tile than this would mostly add blocks that the first of them do not see.
MAX_QUERIES_PER_TILE = 256


def compressed_attention(
    q: Float[Tensor, "b t h d"],
    k_cmp: Float[Tensor, "b c g d"],
    v_cmp: Float[Tensor, "b c g e"],
    config: NSAConfig,
    *,
    num_keys: int | None = None,
    sequences: Sequences = UNIFORM,
    scale: float | None = None,
) -> tuple[Float[Tensor, "b t h e"], Float[Tensor, "b t h"]]:
    """Attention over the compressed blocks.

        o_t = Attn(q_t, K_cmp, V_cmp) over the blocks i with i*d + l - 1 <= t

    Args:
        q: queries, the last t of s positions (or as `sequences` says).
        k_cmp, v_cmp: compressed keys and values (`nsa.ops.compress`), keys rotated at position i*d.
        config: gives l and d.
        num_keys: s, the number of raw tokens behind k_cmp; by default s = t, a whole sequence. Where
            `sequences` gives the lengths it may be left out.
        sequences: where the sequences lie; packed compressed blocks follow one another in the same order.
        scale: factor of the scores, d ** -0.5 by default.

    Returns:
        out in q's dtype, and lse: natural log, fp32 (fp64 for fp64 inputs). A query before position l - 1 sees
        no block: out 0, lse -inf, gradient 0.

    Raises:
        ValueError: shapes that do not fit, or a number of blocks that is not that of s tokens.

    Source: paper eqs. 5 and 7. Tested against the fp64 brute force of nsa.testing.
    """
    bind("compressed_attention", q=(q, "b t h d"), k_cmp=(k_cmp, "b c g d"), v_cmp=(v_cmp, "b c g e"))
    cmp = compressed_stream(k_cmp, v_cmp, config, sequences, num_keys)
    return tiled_attention(q, k_cmp, v_cmp, causal_tiles(q, cmp, op="compressed_attention"), scale=scale)


def compressed_stream(
    k_cmp: Tensor, v_cmp: Tensor, config: NSAConfig, where: Sequences, num_keys: int | None = None
) -> Stream:
    return Stream(k_cmp, v_cmp, config.compress_block_size, config.compress_stride, where, num_keys)


def causal_tiles(q: Tensor, stream: Stream, *, op: str = "attend") -> Callable[[], Iterator[Tile]]:
    """Runs of neighbouring queries against every entry that the last of them sees; one tile a query."""
    h, where, found = q.shape[2], stream.where, stream.k.shape[1]
    if where.seqlens_k is None:
        s = _num_tokens(q, stream)
        expected = where.num_entries(stream.num_entries, s or 0)
        if where.is_packed and found < expected:
            raise ValueError(
                f"{op}: expected at least {expected} compressed blocks for the packed sequences, got {found}"
            )
        if not where.is_packed and found != expected:
            raise ValueError(f"{op}: expected {expected} compressed blocks for {s} keys, got {found}")

    def tiles() -> Iterator[Tile]:
        for part in parts_of(q, stream):
            if stream.num_entries(part.num_keys) > found:
                raise ValueError(f"{op}: {part.num_keys} keys need more than the {found} compressed blocks given")
            rows = part.rows.stop - part.rows.start
            # The first query that sees an entry is at position block - 1; those before it, and padding, get no tile.
            first = max(0, stream.block - 1 - part.first_position)
            while first < part.num_queries:
                visible = stream.num_entries(part.first_position + first + 1)
                # More than elsewhere: long rows of keys are scored in pieces, and read for more queries at once.
                room = max(1, 4 * tile_elements() // (rows * h * (visible + 1)))
                last = min(first + min(room, MAX_QUERIES_PER_TILE), part.num_queries)
                positions = torch.arange(first, last, device=q.device) + part.first_position
                entries = torch.arange(visible, stream.num_entries(part.first_position + last))
                ends = entries.to(q.device) * stream.stride + stream.block - 1
                yield Tile(
                    part.rows,
                    slice(None),
                    slice(part.q_start + first, part.q_start + last),
                    slice(part.c_start, part.c_start + visible + len(ends)),
                    masks=(Mask.alike(visible, ends <= positions[:, None]),),
                    positions=positions,
                )
                first = last

    return tiles


def parts_of(q: Tensor, stream: Stream) -> Iterator[Part]:
    """The sequences behind a stream: of the lengths given, or of `num_tokens` (by default t) tokens a row."""
    b, t = q.shape[:2]
    return stream.where.parts(stream.num_entries, b, t, _num_tokens(q, stream))


def _num_tokens(q: Tensor, stream: Stream) -> int | None:
    if not stream.is_pooled:
        return stream.k.shape[1]
    return q.shape[1] if stream.num_tokens is None and stream.where.is_uniform else stream.num_tokens
