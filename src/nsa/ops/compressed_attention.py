"""Attention over the compressed blocks: the first branch, and the coarse view of the whole past."""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from nsa.config import NSAConfig
from nsa.ops.tiled_attention import tiled_attention
from nsa.ops.tiles import Mask, Tile, tile_elements
from nsa.shapes import UNIFORM, Part, Sequences, bind

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
    tiles = compressed_tiles("compressed_attention", q, k_cmp, config, num_keys, sequences)
    return tiled_attention(q, k_cmp, v_cmp, tiles, scale=scale)


def compressed_tiles(
    op: str, q: Tensor, k_cmp: Tensor, config: NSAConfig, num_keys: int | None, sequences: Sequences
) -> Callable[[], Iterator[Tile]]:
    """Runs of neighbouring queries against every block that the last of them sees; one tile a query."""
    h = q.shape[2]
    if sequences.seqlens_k is None:
        s = q.shape[1] if num_keys is None else num_keys
        expected, found = sequences.num_compressed_blocks(config, s), k_cmp.shape[1]
        if sequences.is_packed and found < expected:
            raise ValueError(
                f"{op}: expected at least {expected} compressed blocks for the packed sequences, got {found}"
            )
        if not sequences.is_packed and found != expected:
            raise ValueError(f"{op}: expected {expected} compressed blocks for {s} keys, got {found}")

    def tiles() -> Iterator[Tile]:
        for part in compressed_parts(q, config, num_keys, sequences):
            if config.num_compressed_blocks(part.num_keys) > k_cmp.shape[1]:
                raise ValueError(
                    f"{op}: {part.num_keys} keys need more than the {k_cmp.shape[1]} compressed blocks given"
                )
            rows = part.rows.stop - part.rows.start
            # The first query that sees a block is at position l - 1; those before it, and padding, get no tile.
            first = max(0, config.compress_block_size - 1 - part.first_position)
            while first < part.num_queries:
                visible = config.num_visible_compressed_blocks(part.first_position + first)
                # More than elsewhere: long rows of keys are scored in pieces, and read for more queries at once.
                room = max(1, 4 * tile_elements() // (rows * h * (visible + 1)))
                last = min(first + min(room, MAX_QUERIES_PER_TILE), part.num_queries)
                positions = torch.arange(first, last, device=q.device) + part.first_position
                blocks = torch.arange(visible, config.num_compressed_blocks(part.first_position + last))
                ends = blocks.to(q.device) * config.compress_stride + config.compress_block_size - 1
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


def compressed_parts(q: Tensor, config: NSAConfig, num_keys: int | None, sequences: Sequences) -> Iterator[Part]:
    """The sequences behind compressed keys: of the lengths given, or of num_keys (by default t) tokens a row."""
    b, t = q.shape[:2]
    has_lengths = sequences.is_packed or sequences.seqlens_k is not None
    return sequences.parts(config, b, t, t if num_keys is None and not has_lengths else num_keys)
