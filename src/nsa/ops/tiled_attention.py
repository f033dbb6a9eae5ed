"""Softmax attention over a list of tiles: the one place where scores, probabilities and gradients are computed.

A branch of NSA differs from another only in which keys a query sees. It says so by tiles: some queries against some
keys, with a mask where not all of them are visible. A tile yields an output and a log-sum-exp; a query that meets its
keys in several tiles gets their outputs weighted by the log-sum-exps, which is the softmax over all of them. Backward
walks the same tiles again and recomputes the probabilities from the log-sum-exp. Nothing of size t x s is ever in
memory: a tile holds about TILE_ELEMENTS scores.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Scores in one tile. 2 MB of fp32: small enough for the cache of a core, large enough that Python costs little.
TILE_ELEMENTS = 1 << 19


@dataclass(frozen=True)
class Tile:
    """Queries against keys. Keys that no mask covers are visible to all of the tile's queries."""

    rows: slice  # of the batch
    groups: slice  # KV heads
    queries: slice | Tensor  # columns of q
    keys: slice | Tensor  # columns of k and v
    # From this key of the tile on, which are visible: bool, broadcastable to [b, g, queries, keys covered].
    masks: tuple[tuple[int, Tensor], ...] = ()
    partial: bool = False  # whether its queries meet more keys in other tiles
    positions: Tensor | None = None  # of the queries in their sequence, for those who observe


# Called in forward with a tile and the probabilities [b, g, queries, keys], summed over the heads of each group.
Observer = Callable[[Tile, Tensor], None]


def tiled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: Callable[[], Iterable[Tile]],
    *,
    scale: float | None = None,
    observe: Observer | None = None,
) -> tuple[Tensor, Tensor]:
    """out = softmax(scale * q k^T over the visible keys) v, and its log-sum-exp.

    Args:
        q, k, v: [b, t, h, d], [b, s, g, d], [b, s, g, e]; h a multiple of g.
        tiles: yields the tiles, the same ones at each call. A (query, key) pair may occur once.
        scale: factor of the scores; d ** -0.5 by default.
        observe: sees the probabilities of each tile, normalised over it; no gradient flows through it.

    Returns:
        out [b, t, h, e] in q's dtype and lse [b, t, h] (natural log; fp32, fp64 for fp64 inputs).
        A query without a visible key has out 0, lse -inf and gradient 0. Both are differentiable, once.
    """
    if scale is None:
        scale = q.shape[-1] ** -0.5
    return _TiledAttention.apply(q, k, v, tiles, scale, observe)


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, tiles, scale, observe):
        b, t, h, _ = q.shape
        g, e = v.shape[2:]
        wide = _accumulation_dtype(q.dtype)
        q_heads, k_heads, v_heads = _by_group(q * scale, g), k.transpose(1, 2), v.transpose(1, 2)
        out = torch.zeros(b, g, t, h // g, e, dtype=wide, device=q.device)
        lse = torch.full(out.shape[:-1], -torch.inf, dtype=wide, device=q.device)

        for tile in tiles():
            p, tile_lse = _probabilities(_scores(tile, q_heads, k_heads))
            tile_out = _attend(p, _take_keys(v_heads, tile, wide))
            if observe is not None:
                observe(tile, p.sum(-2))
            if tile.partial:
                old_lse, old_out = _take_queries(lse, tile), _take_queries(out, tile)
                new_lse = torch.logaddexp(old_lse, tile_lse)
                reference = new_lse.masked_fill(new_lse == -torch.inf, 0.0)  # nothing seen yet: not -inf - -inf
                tile_out *= (tile_lse - reference).exp_().unsqueeze(-1)
                tile_out.addcmul_(old_out, (old_lse - reference).exp_().unsqueeze(-1))
                tile_lse = new_lse
            _put_queries(lse, tile, tile_lse)
            _put_queries(out, tile, tile_out)

        out, lse = _from_group(out).to(q.dtype), _from_group(lse)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.tiles, ctx.scale = tiles, scale
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor):
        q, k, v, out, lse = ctx.saved_tensors
        g = k.shape[2]
        wide = lse.dtype
        q_heads, k_heads, v_heads = _by_group(q * ctx.scale, g), k.transpose(1, 2), v.transpose(1, 2)
        # dS = P (dP - rowsum(dO O) + dlse): one number per row.
        delta = _by_group((d_out.to(wide) * out).sum(-1) - d_lse, g)
        d_out = _by_group(d_out, g)
        lse = _by_group(lse.masked_fill(lse == -torch.inf, torch.inf), g)  # so that empty rows get P = 0
        dq = torch.zeros(q_heads.shape, dtype=wide, device=q.device)
        dk = torch.zeros(k_heads.shape, dtype=wide, device=q.device)
        dv = torch.zeros(v_heads.shape, dtype=wide, device=q.device)

        for tile in ctx.tiles():
            q_tile = _take_queries(q_heads, tile).to(wide)
            d_out_tile = _take_queries(d_out, tile).to(wide)
            scores = _scores(tile, q_heads, k_heads)
            if tile.partial:
                p = scores.sub_(_take_queries(lse, tile).unsqueeze(-1)).exp_()
            else:
                p, _ = _probabilities(scores)
            ds = _attend(d_out_tile, _take_keys(v_heads, tile, wide).transpose(-1, -2))
            ds.sub_(_take_queries(delta, tile).unsqueeze(-1)).mul_(p)
            _add_keys(dv, tile, _transposed(p) @ d_out_tile.flatten(2, 3))
            _add_keys(dk, tile, _transposed(ds) @ q_tile.flatten(2, 3))
            _add_queries(dq, tile, _attend(ds, _take_keys(k_heads, tile, wide)))

        dq = _from_group(dq.mul_(ctx.scale)).to(q.dtype)
        dk, dv = dk.transpose(1, 2).to(k.dtype), dv.transpose(1, 2).to(v.dtype)
        return dq, dk, dv, None, None, None


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _by_group(x: Tensor, g: int) -> Tensor:
    """[b, t, h, ...] -> [b, g, t, heads of the group, ...], contiguous."""
    return x.unflatten(2, (g, -1)).transpose(1, 2).contiguous()


def _from_group(x: Tensor) -> Tensor:
    """The inverse of `_by_group`."""
    return x.transpose(1, 2).flatten(2, 3)


def _take_queries(x: Tensor, tile: Tile) -> Tensor:
    """The tile's queries of x [b, g, t, ...]: a view where they are a slice, else a copy."""
    x = x[tile.rows, tile.groups]
    return x[:, :, tile.queries] if isinstance(tile.queries, slice) else x.index_select(2, tile.queries)


def _put_queries(x: Tensor, tile: Tile, values: Tensor) -> None:
    x = x[tile.rows, tile.groups]
    if isinstance(tile.queries, slice):
        x[:, :, tile.queries] = values
    else:
        x.index_copy_(2, tile.queries, values)


def _add_queries(x: Tensor, tile: Tile, values: Tensor) -> None:
    x = x[tile.rows, tile.groups]
    if isinstance(tile.queries, slice):
        x[:, :, tile.queries] += values
    else:
        x.index_add_(2, tile.queries, values)


def _take_keys(x: Tensor, tile: Tile, dtype: torch.dtype) -> Tensor:
    x = x[tile.rows, tile.groups]
    return (x[:, :, tile.keys] if isinstance(tile.keys, slice) else x.index_select(2, tile.keys)).to(dtype)


def _add_keys(x: Tensor, tile: Tile, values: Tensor) -> None:
    x = x[tile.rows, tile.groups]
    if isinstance(tile.keys, slice):
        x[:, :, tile.keys] += values
    else:
        x.index_add_(2, tile.keys, values)


def _attend(rows: Tensor, keys: Tensor) -> Tensor:
    """[b, g, queries, heads, m] @ [b, g, m, n]: the heads of a group share the right-hand side."""
    return (rows.flatten(2, 3) @ keys).unflatten(2, rows.shape[2:4])


def _transposed(p: Tensor) -> Tensor:
    """[b, g, queries, heads, keys] -> [b, g, keys, queries * heads]."""
    return p.flatten(2, 3).transpose(-1, -2)


def _scores(tile: Tile, q_heads: Tensor, k_heads: Tensor) -> Tensor:
    """Scores [b, g, queries, heads, keys] of a tile (q is scaled already), -inf where a key is not visible."""
    wide = _accumulation_dtype(q_heads.dtype)
    keys = _take_keys(k_heads, tile, wide).transpose(-1, -2)
    scores = _attend(_take_queries(q_heads, tile).to(wide), keys)
    for first, mask in tile.masks:
        scores[..., first : first + mask.shape[-1]].masked_fill_(~mask.unsqueeze(-2), -torch.inf)
    return scores


def _probabilities(scores: Tensor) -> tuple[Tensor, Tensor]:
    """softmax over the keys and its log-sum-exp; zeros and -inf for a row that sees no key."""
    top = scores.amax(-1)
    p = scores.softmax(-1)
    lse = top - p.amax(-1).log()  # the largest probability is exp(top - lse), and never underflows
    empty = top == -torch.inf
    if empty.any():
        p = p.masked_fill(empty.unsqueeze(-1), 0.0)
        lse = lse.masked_fill(empty, -torch.inf)
    return p, lse
