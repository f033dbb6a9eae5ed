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
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

# exp() of this is far from overflow, and far above any sum of probabilities that is let pass.
LARGEST_EXPONENT = 80.0
# Sums of exponentials relative to a reference may grow to this; the outputs they weigh still have room. The difference
# to the reference is then rounded to 2e-6 at most in fp32, as scores of that size are themselves.
LARGEST_MASS = 1e25
# Scores in one tile for each thread. 2 MB of fp32: small enough for the cache of a core, large enough that Python costs
# little.
TILE_ELEMENTS = 1 << 19
MAX_THREADS = 8  # that make a tile larger
# A long row of keys is scored in pieces, so that scores and keys stay in the cache of a core from step to step: of so
# many keys at least, and so many scores.
PIECE, PIECE_SCORES = 512, 1 << 17


def tile_elements() -> int:
    """Scores in one tile, all threads together."""
    return TILE_ELEMENTS * min(torch.get_num_threads(), MAX_THREADS)


@dataclass(frozen=True)
class Mask:
    """Which keys are visible to which queries, in one stretch of a tile's keys."""

    first: int  # key of the tile
    visible: Tensor  # [b, g, queries, n], fp32, 1 or 0; dimensions of size 1 where all are alike
    width: int = 1  # how many neighbouring keys each of the n stands for

    def of(self, x: Tensor) -> Tensor:
        """Its stretch of x [b, g, queries, heads, keys], as [..., n, width]."""
        n = self.visible.shape[-1]
        return x[..., self.first : self.first + n * self.width].unflatten(-1, (n, self.width))

    @property
    def factor(self) -> Tensor:
        return self.visible[..., None, :, None]

    @staticmethod
    def alike(first: int, visible: Tensor) -> "Mask":
        """Of bools [queries, n], the same for all rows and groups."""
        return Mask(first, visible.float()[None, None])


@dataclass(frozen=True)
class Tile:
    """Queries against keys. Keys that no mask covers are visible to all of the tile's queries."""

    rows: slice  # of the batch
    groups: slice  # KV heads
    queries: slice | Tensor  # columns of q; one by one only in a tile of one row and group
    keys: slice | Tensor  # columns of k and v
    masks: tuple[Mask, ...] = ()
    # For each query (or for all) a key of the tile whose score is probably not far below the row's largest.
    typical_key: int | Tensor = 0
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
        lines = _lines(x, tile)
        found = self.take((len(tile.queries), lines.shape[1]), x)
        return torch.index_select(lines, 0, tile.queries, out=found).view(1, 1, -1, *x.shape[3:])


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, tiles, scale, observe):
        b, t, h, _ = q.shape
        g, e = v.shape[2:]
        wide = _accumulation_dtype(q.dtype)
        q_heads = _by_group(q.to(wide) * scale, g)
        k_heads, v_heads = (x.to(wide).transpose(1, 2).contiguous() for x in (k, v))
        out = torch.zeros(b, g, t, h // g, e, dtype=wide, device=q.device)
        lse = torch.full(out.shape[:-1], -torch.inf, dtype=wide, device=q.device)
        sums = _Sums(out, lse)
        scratch = _Scratch()

        for tile in tiles():
            scratch.clear()
            q_tile = scratch.queries(q_heads, tile)
            k_tile, v_tile = (_take_keys(x, tile) for x in (k_heads, v_heads))
            if tile.partial:
                sums.add(tile, q_tile, k_tile, v_tile, scratch)
                continue
            tile_out, tile_lse, share, ps = _attend_whole(tile, q_tile, k_tile, v_tile, scratch)
            _put_queries(lse, tile, tile_lse)
            _put_queries(out, tile, tile_out)
            if observe is not None:
                sums_over_heads = [_sum_over_heads(p, share) for p in ps]
                observe(tile, torch.cat(sums_over_heads, -1) if len(ps) > 1 else sums_over_heads[0])
        sums.divide()

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
        q_heads = _by_group(q.to(wide) * ctx.scale, g)
        k_heads, v_heads = (x.to(wide).transpose(1, 2).contiguous() for x in (k, v))
        # dS = P (dP - rowsum(dO O) + dlse): one number per row.
        delta = _by_group((d_out.to(wide) * out).sum(-1) - d_lse, g)
        d_out = _by_group(d_out.to(wide), g)
        lse = _by_group(lse.masked_fill(lse == -torch.inf, torch.inf), g)  # so that empty rows get P = 0
        dq, dk, dv = torch.zeros_like(q_heads), torch.zeros_like(k_heads), torch.zeros_like(v_heads)
        scratch = _Scratch()

        for tile in ctx.tiles():
            scratch.clear()
            q_tile = scratch.queries(q_heads, tile)
            k_tile, v_tile = (_take_keys(x, tile) for x in (k_heads, v_heads))
            d_out_tile = scratch.queries(d_out, tile)
            p = _exponentials(tile, _attend(q_tile, k_tile.transpose(-1, -2), scratch), scratch.queries(lse, tile))
            ds = _attend(d_out_tile, v_tile.transpose(-1, -2), scratch)
            ds.sub_(scratch.queries(delta, tile).unsqueeze(-1)).mul_(p)
            _add_keys(dv, tile, _transposed(p) @ d_out_tile.flatten(2, 3))
            _add_keys(dk, tile, _transposed(ds) @ q_tile.flatten(2, 3))
            _add_queries(dq, tile, _attend(ds, k_tile, scratch))

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


def _lines(x: Tensor, tile: Tile) -> Tensor:
    """x [b, g, t, ...] of the tile's one row and group as a matrix, a line a query: indexing it is fast."""
    return x[tile.rows, tile.groups].flatten(0, 2).flatten(1)


def _put_queries(x: Tensor, tile: Tile, values: Tensor) -> None:
    if isinstance(tile.queries, slice):
        x[tile.rows, tile.groups, tile.queries] = values
    else:
        _lines(x, tile).index_copy_(0, tile.queries, values.flatten(0, 2).flatten(1))


def _add_queries(x: Tensor, tile: Tile, values: Tensor) -> None:
    if isinstance(tile.queries, slice):
        x[tile.rows, tile.groups, tile.queries] += values
    else:
        _lines(x, tile).index_add_(0, tile.queries, values.flatten(0, 2).flatten(1))


def _take_keys(x: Tensor, tile: Tile) -> Tensor:
    x = x[tile.rows, tile.groups]
    return x[:, :, tile.keys] if isinstance(tile.keys, slice) else x.index_select(2, tile.keys)


def _add_keys(x: Tensor, tile: Tile, values: Tensor) -> None:
    x = x[tile.rows, tile.groups]
    if isinstance(tile.keys, slice):
        x[:, :, tile.keys] += values
    else:
        x.index_add_(2, tile.keys, values)


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
        reference = torch.where(near, reference, largest.masked_fill_(largest == -torch.inf, 0.0))
        ps, mass = exponentials()
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
    visible = scores.clone()
    for mask in tile.masks:
        mask.of(visible).masked_fill_(mask.factor == 0, -torch.inf)
    return visible.amax(-1)


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
                _add_queries(self.mass, tile, mass)
                _add_queries(self.out, tile, _attend(p, v_tile, scratch))
                return
        scores = _attend(q_tile, keys, scratch)
        raised = self._raise(tile, reference, _largest(tile, scores))
        p = _exponentials(tile, scores, raised.masked_fill(raised == -torch.inf, 0.0))
        _add_queries(self.mass, tile, p.sum(-1))
        _add_queries(self.out, tile, _attend(p, v_tile, scratch))

    def _raise(self, tile: Tile, reference: Tensor, largest: Tensor) -> Tensor:
        """The reference of each row, moved to `largest` where that is far above it, the sums so far brought along."""
        assert self.mass is not None
        # A row so far above has a mass that no other path lets pass, so what happens to it depends on no other row.
        far = ~(largest - reference < math.log(LARGEST_MASS)) & (largest > -torch.inf)
        raised = torch.where(far, largest, reference)
        kept = torch.where(far, (reference - raised).exp_(), 1.0)
        _put_queries(self.reference, tile, raised)
        for sums, factor in ((self.mass, kept), (self.out, kept.unsqueeze(-1))):
            _put_queries(sums, tile, sums[tile.rows, tile.groups, tile.queries] * factor)
        return raised

    def divide(self) -> None:
        if self.mass is not None:
            self.out.div_(self.mass.unsqueeze(-1))
            self.reference.add_(self.mass.log_())
