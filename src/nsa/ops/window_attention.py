"""The sliding window: each query attends to the w keys that end at its own position (paper, section 3.3.3)."""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from nsa.ops.tiled_attention import tiled_attention
from nsa.ops.tiles import Mask, Tile, tile_elements
from nsa.shapes import UNIFORM, Sequences, bind
from nsa.streams import Stream, Window

# Queries that share a tile, or a quarter of the window if that is more: four of five keys are then visible to a query.
MAX_QUERIES_PER_TILE = 64


def window_attention(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b s g d"],
    v: Float[Tensor, "b s g e"],
    window_size: int,
    *,
    sequences: Sequences = UNIFORM,
    scale: float | None = None,
) -> tuple[Float[Tensor, "b t h e"], Float[Tensor, "b t h"]]:
    """Attention over the sliding window.

        o_t = Attn(q_t, K, V) over the keys at positions (t - w, t]

    Exactly w keys, the own one included, in training and decoding alike; fewer at the start of a sequence.

    Args:
        q: queries, the last t of s positions (or as `sequences` says).
        k, v: keys and values of the window branch; keys carry their rotary position.
        window_size: w >= 1, in keys.
        sequences: where the sequences lie (nsa.shapes.Sequences).
        scale: factor of the scores, d ** -0.5 by default.

    Returns:
        out in q's dtype, and lse: natural log, fp32 (fp64 for fp64 inputs). Padding queries give 0 and -inf.

    Raises:
        ValueError: shapes that do not fit, h not a multiple of g, window_size < 1.

    Source: paper section 3.3.3. Tested against the fp64 brute force of nsa.testing.
    """
    bind("window_attention", q=(q, "b t h d"), k=(k, "b s g d"), v=(v, "b s g e"))
    return tiled_attention(q, k, v, window_tiles(q, Stream(k, v, where=sequences), Window(window_size)), scale=scale)


def window_tiles(q: Tensor, stream: Stream, reach: Window) -> Callable[[], Iterator[Tile]]:
    """Runs of neighbouring queries against the keys that some of them see; one tile a query."""
    (b, t, h, _), s, window_size = q.shape, stream.k.shape[1], reach.size
    if window_size < 1:
        raise ValueError(f"window_attention: window_size should be at least 1, got {window_size}")

    def tiles() -> Iterator[Tile]:
        for part in stream.where.parts(None, b, t, s):
            # Leading queries at negative positions are padding: no tile touches them.
            padding = max(0, -part.first_position)
            room = max(1, tile_elements() // ((part.rows.stop - part.rows.start) * h * window_size))
            size = min(room, max(MAX_QUERIES_PER_TILE, window_size // 4))
            for first in range(padding, part.num_queries, size):
                last = min(first + size, part.num_queries)
                positions = torch.arange(first, last, device=q.device) + part.first_position
                low = max(0, first + part.first_position - window_size + 1)
                high = last + part.first_position
                # Only the first and last keys of the tile are hidden from some of its queries.
                age = positions[:, None] - torch.arange(low, high, device=q.device)
                edge = last - first
                first_keys = age if high - low < 2 * edge else age[:, :edge]
                masks = (
                    Mask.alike(0, first_keys < window_size),
                    Mask.alike(high - low - edge, age[:, -edge:] >= 0),
                )
                yield Tile(
                    part.rows,
                    slice(None),
                    slice(part.q_start + first, part.q_start + last),
                    slice(part.k_start + low, part.k_start + high),
                    masks,
                    typical_key=positions - low,  # the own one
                )

    return tiles
