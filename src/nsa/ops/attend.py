"""Attention of queries to a stream, as far as a reach says: every branch of every method, by tiles or by kernels."""

from collections.abc import Callable, Iterator
from typing import Any

from jaxtyping import Float
from torch import Tensor

from nsa.backend import Backend, resolve
from nsa.ops.compressed_attention import causal_tiles
from nsa.ops.selected_attention import block_tiles
from nsa.ops.tiled_attention import factor, tiled_attention
from nsa.ops.tiles import Tile
from nsa.ops.window_attention import window_tiles
from nsa.shapes import bind
from nsa.streams import Blocks, Causal, Reach, Stream, Window


def attend(
    q: Float[Tensor, "b t h d"],
    stream: Stream,
    reach: Reach,
    *,
    scale: float | None = None,
    backend: Backend | None = None,
) -> tuple[Float[Tensor, "b t h e"], Float[Tensor, "b t h"]]:
    """Attention over the entries that a query sees.

        o_t = Attn(q_t, K, V) over the entries i of the stream that `reach` lets the query at position t see

    Args:
        q: queries, the last t of the stream's positions, or as `stream.where` says.
        stream: keys and values; h is a multiple of their g.
        reach: `Causal()`, `Window(size)` or `Blocks(indices, size)`.
        scale: factor of the scores, d ** -0.5 by default.
        backend: as for `native_sparse_attention`.

    Returns:
        out in q's dtype, and lse: natural log, fp32 (fp64 for fp64 inputs). A query that sees no entry, and padding,
        give out 0, lse -inf, gradient 0.

    Raises:
        ValueError: shapes or lengths that do not fit; a window or blocks over pooled entries; a backend that cannot
            serve.

    Tested against the ops of the branches, which are tested against the fp64 brute force of nsa.testing.
    """
    bind("attend", q=(q, "b t h d"), k=(stream.k, "b c g d"), v=(stream.v, "b c g e"))
    if stream.is_pooled and not isinstance(reach, Causal):
        raise ValueError(f"attend: {type(reach).__name__} is of raw streams, got one entry for {stream.block} tokens")
    scale = factor(q, scale)
    if resolve(q, stream.k, stream.v, scale=scale, backend=backend) == "triton":
        from nsa.kernels.library import attend as on_kernels  # only where triton is installed

        return on_kernels(q, stream, reach, scale)
    tiles: Callable[[Tensor, Stream, Any], Callable[[], Iterator[Tile]]] = TILES[type(reach)]
    return tiled_attention(q, stream.k, stream.v, tiles(q, stream, reach), scale=scale)


TILES: dict[type, Callable[..., Any]] = {
    Causal: lambda q, stream, reach: causal_tiles(q, stream),
    Window: window_tiles,
    Blocks: block_tiles,
}
