"""Softmax attention over a list of tiles: the one place where scores, probabilities and gradients are computed.

A branch of NSA differs from another only in which keys a query sees. It says so by tiles: some queries against some
keys, with a mask where not all of them are visible. A tile that holds all keys of its queries yields their output and
log-sum-exp. Where queries meet their keys in several tiles (`Tile.partial`), each adds exp(score - reference) v to one
sum and its mass to another, the first of them having set the reference; the division comes last. Backward walks the
same tiles again and recomputes the probabilities from the log-sum-exp. Nothing of size t x s is ever in memory: a tile
holds about `tile_elements()` scores.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from nsa.ops.careful_attention import careful_backward, careful_forward
from nsa.ops.tiles import (
    Observer,
    Tile,
    accumulation_dtype,
    add_keys,
    add_queries,
    are_finite,
    by_group,
    from_group,
    lines,
    put_queries,
    take_keys,
    visible,
    without_autocast,
)

# exp() of this is far from overflow, and far above any sum of probabilities that is let pass.
LARGEST_EXPONENT = 80.0
# Sums of exponentials relative to a reference may grow to this; the outputs they weigh still have room. The difference
# to the reference is then rounded to 2e-6 at most in fp32, as scores of that size are themselves.
LARGEST_MASS = 1e25
# A long row of keys is scored in pieces, so that scores and keys stay in the cache of a core from step to step: of so
# many keys at least, and so many scores.
PIECE, PIECE_SCORES = 512, 1 << 17


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
        A query without a visible key has out 0, lse -inf and gradient 0. Both are differentiable, once. A number that
        is not finite reaches the queries that see it, and changes no bit of the others' results: what comes out not
        finite is computed again by `careful_attention`, forward and backward each.
    """
    return _TiledAttention.apply(q, k, v, tiles, factor(q, scale), observe)


def factor(q: Tensor, scale: float | None) -> float:
    """The factor of the scores; d ** -0.5 by default.

    Raises:
        ValueError: a scale that is not a finite number above 0, or no head dim.
    """
    if q.shape[-1] == 0:
        raise ValueError(f"q should have a head dim of at least 1, got {list(q.shape)}")
    if scale is None:
        return q.shape[-1] ** -0.5
    if not isinstance(scale, int | float) or not 0.0 < scale < math.inf:
        raise ValueError(f"scale should be a finite number above 0, got {scale!r}")
    return float(scale)


class _Scratch:
    """Memory for what one tile computes, used again by the next: fresh pages cost as much as the arithmetic on them."""

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []
        self.taken = 0

    def clear(self) -> None:
        self.taken = 0

    def take(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Uninitialised memory, valid until `clear`."""
        size = math.prod(shape)
        if self.taken == len(self.buffers):
            self.buffers.append(like.new_empty(size))
        if self.buffers[self.taken].numel() < size:
            self.buffers[self.taken] = like.new_empty(size)
        self.taken += 1
        return self.buffers[self.taken - 1][:size].view(*shape)

    def queries(self, x: Tensor, tile: Tile) -> Tensor:
        """The tile's queries of x [b, g, t, ...]: a view where they are a slice, else a copy."""
        if isinstance(tile.queries, slice):
            return x[tile.rows, tile.groups, tile.queries]
        rows = lines(x, tile)
        found = self.take((len(tile.queries), rows.shape[1]), x)
        return torch.index_select(rows, 0, tile.queries, out=found).view(1, 1, -1, *x.shape[3:])


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx: Any, q, k, v, tiles, scale, observe):
        b, t, h, _ = q.shape
        g, e = v.shape[2:]
        wide = accumulation_dtype(q.dtype)
        q_heads = by_group(q.to(wide) * scale, g)
        k_heads, v_heads = (x.to(wide).transpose(1, 2).contiguous() for x in (k, v))
        out = torch.zeros(b, g, t, h // g, e, dtype=wide, device=q.device)
        lse = torch.full(out.shape[:-1], -torch.inf, dtype=wide, device=q.device)
        sums = _Sums(out, lse)
        scratch = _Scratch()

        for tile in tiles():
            scratch.clear()
            q_tile = scratch.queries(q_heads, tile)
            k_tile, v_tile = (take_keys(x, tile) for x in (k_heads, v_heads))
            if tile.partial:
                sums.add(tile, q_tile, k_tile, v_tile, scratch)
                continue
            tile_out, tile_lse, share, ps = _attend_whole(tile, q_tile, k_tile, v_tile, scratch)
            put_queries(lse, tile, tile_lse)
            put_queries(out, tile, tile_out)
            if observe is not None:
                sums_over_heads = [_sum_over_heads(p, share) for p in ps]
                observe(tile, torch.cat(sums_over_heads, -1) if len(ps) > 1 else sums_over_heads[0], None)
        sums.divide()
        # Where lse is NaN or inf, out is NaN; without values there is only lse.
        if not are_finite(out if e else lse.masked_fill(lse == -torch.inf, 0.0)):
            out, lse = careful_forward(q_heads, k_heads, v_heads, tiles, observe, out, lse)

        out, lse = from_group(out), from_group(lse)
        # Wide: of d_out * out, rounded, more would be lost than some gradients are large.
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.tiles, ctx.scale = tiles, scale
        return out.to(q.dtype), lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    @without_autocast
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor):
        q, k, v, out, lse = ctx.saved_tensors
        g = k.shape[2]
        wide = lse.dtype
        q_heads = by_group(q.to(wide) * ctx.scale, g)
        k_heads, v_heads = (x.to(wide).transpose(1, 2).contiguous() for x in (k, v))
        # dS = P (dP - rowsum(dO O) + dlse): one number per row.
        delta = by_group((d_out.to(wide) * out).sum(-1) - d_lse, g)
        d_out = by_group(d_out.to(wide), g)
        lse = by_group(lse.masked_fill(lse == -torch.inf, torch.inf), g)  # so that empty rows get P = 0
        dq, dk, dv = torch.zeros_like(q_heads), torch.zeros_like(k_heads), torch.zeros_like(v_heads)
        scratch = _Scratch()

        for tile in ctx.tiles():
            scratch.clear()
            q_tile = scratch.queries(q_heads, tile)
            k_tile, v_tile = (take_keys(x, tile) for x in (k_heads, v_heads))
            d_out_tile = scratch.queries(d_out, tile)
            p = _exponentials(tile, _attend(q_tile, k_tile.transpose(-1, -2), scratch), scratch.queries(lse, tile))
            ds = _attend(d_out_tile, v_tile.transpose(-1, -2), scratch)
            ds.sub_(scratch.queries(delta, tile).unsqueeze(-1)).mul_(p)
            add_keys(dv, tile, _transposed(p) @ d_out_tile.flatten(2, 3))
            add_keys(dk, tile, _transposed(ds) @ q_tile.flatten(2, 3))
            add_queries(dq, tile, _attend(ds, k_tile, scratch))

        if not are_finite(dq, dk, dv):
            careful = careful_backward(q_heads, k_heads, v_heads, d_out, lse, delta, ctx.tiles)
            dq, dk, dv = (x.where(x.isfinite(), y) for x, y in zip((dq, dk, dv), careful, strict=True))

        dq = from_group(dq.mul_(ctx.scale)).to(q.dtype)
        dk, dv = dk.transpose(1, 2).to(k.dtype), dv.transpose(1, 2).to(v.dtype)
        return dq, dk, dv, None, None, None


def _attend(rows: Tensor, keys: Tensor, scratch: _Scratch) -> Tensor:
    """[b, g, queries, heads, m] @ [b, g, m, n]: the heads of a group share the right-hand side."""
    b, g, queries, heads, _ = rows.shape
    out = scratch.take((b * g, queries * heads, keys.shape[-1]), rows)
    left, right = rows.flatten(2, 3).flatten(0, 1), keys.flatten(0, 1)
    threads = torch.get_num_threads()
    if b * g == 1 and threads > 1 and queries * heads % threads == 0:
        # A product with few columns keeps one core busy; as many products of fewer rows keep them all.
        left, right = left.view(threads, -1, left.shape[-1]), right.expand(threads, -1, -1)
    torch.bmm(left, right, out=out.view(left.shape[0], left.shape[1], -1))
    return out.view(b, g, queries, heads, -1)


def _transposed(p: Tensor) -> Tensor:
    """[b, g, queries, heads, keys] -> [b, g, keys, queries * heads]."""
    return p.flatten(2, 3).transpose(-1, -2)


def _exponentials(tile: Tile, scores: Tensor, reference: Tensor) -> Tensor:
    """exp(scores - reference) where a key is visible, 0 where not; in place.

    Hiding by a product after exp() is many times faster on a CPU than -inf before it. It needs finite exponentials.
    """
    scores.sub_(reference.unsqueeze(-1))
    for mask in tile.masks:
        mask.of(scores).clamp_(max=LARGEST_EXPONENT)
    p = scores.exp_()
    for mask in tile.masks:
        mask.of(p).mul_(mask.factor)
    return p


def _attend_whole(
    tile: Tile, q_tile: Tensor, k_tile: Tensor, v_tile: Tensor, scratch: _Scratch
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """out, lse, share, ps of queries that meet all their keys in this tile: share * p are the probabilities.

    exp() needs a reference not too far from the largest score of the row. Mostly the score of a typical key will do,
    and the search for the maximum is saved. Rows in which it proves too far off are done again with their maximum.
    What happens in a row depends on no other row.
    """
    slices = _pieces(tile, q_tile.shape[:4].numel(), k_tile.shape[2])
    pieces = [(piece, k_tile[:, :, piece].transpose(-1, -2)) for piece in slices]
    reference = _typical_scores(tile, q_tile, k_tile, scratch)

    def exponentials() -> tuple[list[Tensor], Tensor]:
        ps = [_exponentials(_part(tile, piece), _attend(q_tile, keys, scratch), reference) for piece, keys in pieces]
        return ps, sum((p.sum(-1) for p in ps[1:]), ps[0].sum(-1))

    ps, mass = exponentials()
    near = (mass > 1.0 / LARGEST_MASS) & (mass < LARGEST_MASS)  # false for NaN
    if not bool(near.all()):
        tops = [_largest(_part(tile, piece), _attend(q_tile, keys, scratch)) for piece, keys in pieces]
        largest = torch.stack(tops).amax(0)
        lost = _lost(tile, largest, k_tile.shape[2])
        reference = torch.where(near, reference, largest.masked_fill_(largest == -torch.inf, 0.0))
        ps, mass = exponentials()
        mass.masked_fill_(lost, torch.nan)
    share = mass.masked_fill(mass == 0.0, 1.0).reciprocal_()  # a row that sees no key: p is 0
    outs = [_attend(p, v_tile[:, :, piece], scratch) for p, (piece, _) in zip(ps, pieces, strict=True)]
    out = outs[0]
    for more in outs[1:]:
        out.add_(more)
    return out.mul_(share.unsqueeze(-1)), mass.log_().add_(reference), share, ps


def _pieces(tile: Tile, num_rows: int, num_keys: int) -> list[slice]:
    """Stretches of the tile's keys; all that is masked is in the last."""
    size = max(PIECE, PIECE_SCORES // num_rows)
    free = min([num_keys - 1, *(mask.first for mask in tile.masks)])
    starts = [0, *range(size, free + 1, size)]
    return [slice(start, stop) for start, stop in pairwise([*starts, num_keys])]


def _part(tile: Tile, piece: slice) -> Tile:
    """The tile with the masks of one piece of its keys."""
    masks = tuple(replace(mask, first=mask.first - piece.start) for mask in tile.masks if mask.first < piece.stop)
    return replace(tile, masks=masks)


def _typical_scores(tile: Tile, q_tile: Tensor, k_tile: Tensor, scratch: _Scratch) -> Tensor:
    if isinstance(tile.typical_key, int):
        key = k_tile[:, :, tile.typical_key, :, None]
        return _attend(q_tile, key, scratch).squeeze(-1)
    return (q_tile * k_tile[:, :, tile.typical_key].unsqueeze(3)).sum(-1)


def _largest(tile: Tile, scores: Tensor) -> Tensor:
    """The largest visible score of each row, -inf where there is none."""
    scores = scores.clone()
    for mask in tile.masks:
        mask.of(scores).masked_fill_(mask.factor == 0, -torch.inf)
    return scores.amax(-1)


def _lost(tile: Tile, largest: Tensor, num_keys: int) -> Tensor:
    """Rows that see keys, but none with a score above -inf: their softmax is undefined."""
    lost = largest == -torch.inf
    if bool(lost.any()):
        lost &= visible(tile, (*largest.shape, num_keys), largest.device).any(-1)
    return lost


def _sum_over_heads(p: Tensor, share: Tensor) -> Tensor:
    """Probabilities share * p [b, g, queries, heads, keys], summed over the heads of each group; p is used up."""
    if p.shape[3] == 1:
        return p.mul_(share.unsqueeze(-1)).squeeze(3)
    return (share.flatten(0, 2).unsqueeze(1) @ p.flatten(0, 2)).view(*p.shape[:3], -1)


class _Sums:
    """Outputs and masses of queries that meet their keys in several tiles, relative to a reference for each row.

    The reference is the largest score of the first tile with a visible key. So the mass is at least 1, nothing that
    matters underflows, and only scores far above the reference raise it.
    """

    def __init__(self, out: Tensor, lse: Tensor) -> None:
        self.out, self.reference = out, lse  # both in place: `divide` makes of them what their names say
        self.mass: Tensor | None = None

    def add(self, tile: Tile, q_tile: Tensor, k_tile: Tensor, v_tile: Tensor, scratch: _Scratch) -> None:
        if self.mass is None:
            self.mass = torch.ones_like(self.reference)
        keys = k_tile.transpose(-1, -2)
        reference = scratch.queries(self.reference, tile)
        if bool((reference > -torch.inf).all()):  # false for NaN
            p = _exponentials(tile, _attend(q_tile, keys, scratch), reference)
            mass = p.sum(-1)
            if bool((mass < LARGEST_MASS).all()):
                add_queries(self.mass, tile, mass)
                add_queries(self.out, tile, _attend(p, v_tile, scratch))
                return
        scores = _attend(q_tile, keys, scratch)
        largest = _largest(tile, scores)
        lost = _lost(tile, largest, k_tile.shape[2])
        raised = self._raise(tile, reference, largest)
        p = _exponentials(tile, scores, raised.masked_fill(raised == -torch.inf, 0.0))
        add_queries(self.mass, tile, p.sum(-1).masked_fill_(lost, torch.nan))
        add_queries(self.out, tile, _attend(p, v_tile, scratch))

    def _raise(self, tile: Tile, reference: Tensor, largest: Tensor) -> Tensor:
        """The reference of each row, moved to `largest` where that is far above it, the sums so far brought along."""
        assert self.mass is not None
        # A row so far above has a mass that no other path lets pass, so what happens to it depends on no other row.
        far = ~(largest - reference < math.log(LARGEST_MASS)) & (largest > -torch.inf)
        raised = torch.where(far, largest, reference)
        kept = torch.where(far, (reference - raised).exp_(), 1.0)
        put_queries(self.reference, tile, raised)
        for sums, factor in ((self.mass, kept), (self.out, kept.unsqueeze(-1))):
            put_queries(sums, tile, sums[tile.rows, tile.groups, tile.queries] * factor)
        return raised

    def divide(self) -> None:
        if self.mass is not None:
            self.out.div_(self.mass.unsqueeze(-1))
            self.reference.add_(self.mass.log_())
