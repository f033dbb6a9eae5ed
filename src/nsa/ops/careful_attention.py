"""The sums of `tiled_attention` where something is not finite, done so that it stays with those who see it.

The fast way hides a key by a factor of 0, and 0 times NaN is NaN. Here what is hidden is left out: hidden scores are
-inf before exp(), and of a product of probabilities and values only the finite values are multiplied; a row that sees
another one gets NaN. Every row takes its largest score as reference, so nothing that is finite overflows either.

Tensors are by group, as in `nsa.ops.tiles`; q is scaled.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from nsa.ops.tiles import Observer, Tile, add_keys, add_queries, put_queries, take_keys, take_queries, visible


def careful_forward(
    q: Tensor, k: Tensor, v: Tensor, tiles: Callable[[], Iterable[Tile]], observe: Observer | None,
    fast_out: Tensor, fast_lse: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out and lse: the fast ones where they are finite; NaN where a query sees a score of inf, or none above -inf."""
    out, lse = torch.zeros_like(fast_out), torch.full_like(fast_lse, -torch.inf)
    sees = torch.zeros_like(lse, dtype=torch.bool)
    is_lost = ~(fast_lse < torch.inf)  # or NaN
    again = (is_lost | ~fast_out.isfinite().all(-1)).any(-1)
    for tile in tiles():
        if not bool(take_queries(again, tile).any()):
            continue
        seen, scores, v_tile = _tile(q, k, v, tile)
        tile_lse = scores.logsumexp(-1)
        tile_lse = tile_lse.masked_fill_(tile_lse == torch.inf, torch.nan)  # an infinite score has no softmax
        p = (scores - _or_zero(tile_lse).unsqueeze(-1)).exp()
        tile_out = _product(p, v_tile, seen)
        if tile.partial:
            before, so_far = take_queries(lse, tile), tile_lse
            tile_lse = torch.logaddexp(before, so_far)
            w_before, w_tile = ((x - _or_zero(tile_lse)).exp().unsqueeze(-1) for x in (before, so_far))
            tile_out = w_before * take_queries(out, tile) + w_tile * tile_out
        elif observe is not None:
            observe(tile, p.sum(3), take_queries(is_lost, tile).any(-1))
        for x, values in ((lse, tile_lse), (out, tile_out), (sees, take_queries(sees, tile) | seen.any(-1))):
            put_queries(x, tile, values)
    undefined = sees & (lse == -torch.inf)
    out, lse = out.masked_fill_(undefined.unsqueeze(-1), torch.nan), lse.masked_fill_(undefined, torch.nan)
    return fast_out.where(fast_out.isfinite(), out), lse.where(is_lost, fast_lse)


def careful_backward(
    q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, lse: Tensor, delta: Tensor, tiles: Callable[[], Iterable[Tile]]
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv; lse is +inf for empty rows, delta is rowsum(d_out * out) - d_lse."""
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for tile in tiles():
        seen, scores, v_tile = _tile(q, k, v, tile)
        d_out_tile = take_queries(d_out, tile)
        p = (scores - take_queries(lse, tile).unsqueeze(-1)).exp().where(seen, 0.0)
        d_p = d_out_tile @ v_tile.unsqueeze(2).mT
        ds = (p * (d_p - take_queries(delta, tile).unsqueeze(-1))).where(seen, 0.0)
        add_queries(dq, tile, _product(ds, take_keys(k, tile), seen))
        # Keys by queries: all heads of a group add to its key.
        p, ds, seen = (x.flatten(2, 3).mT.unsqueeze(3) for x in (p, ds, seen))
        add_keys(dk, tile, _product(ds, take_queries(q, tile).flatten(2, 3), seen).squeeze(3))
        add_keys(dv, tile, _product(p, d_out_tile.flatten(2, 3), seen).squeeze(3))
    return dq, dk, dv


def _tile(q: Tensor, k: Tensor, v: Tensor, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
    """What is visible, the scores [b, g, queries, heads, keys] with -inf where not, and the values."""
    scores = take_queries(q, tile) @ take_keys(k, tile).unsqueeze(2).mT
    seen = visible(tile, scores.shape, scores.device)
    return seen, scores.where(seen, -torch.inf), take_keys(v, tile)


def _or_zero(lse: Tensor) -> Tensor:
    """As a reference: not -inf - -inf."""
    return lse.masked_fill(lse == -torch.inf, 0.0)


def _product(weights: Tensor, x: Tensor, seen: Tensor) -> Tensor:
    """weights [b, g, n, heads, m] @ x [b, g, m, w]: NaN where a row sees a number that is not finite."""
    finite, x = x.isfinite().unsqueeze(2), x.unsqueeze(2)
    out = weights @ x.where(finite, 0.0)
    if not bool(finite.all()):
        out.masked_fill_(seen.to(x.dtype) @ (~finite).to(x.dtype) > 0, torch.nan)
    return out
