"""What a branch says of its sum: tiles of queries against keys; and how tensors are read and added to by tile.

Inside, queries lie [b, g, t, heads of the group, d] and keys [b, g, s, d], contiguous.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

# Scores in one tile for each thread. 2 MB of fp32: small enough for the cache of a core, large enough that Python costs
# little.
TILE_ELEMENTS = 1 << 19
MAX_THREADS = 8  # that make a tile larger


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


def visible(tile: Tile, shape: Sequence[int], device: torch.device) -> Tensor:
    """Which keys are visible, bool [b, g, queries, heads, keys] of that shape."""
    found = torch.ones(*shape, dtype=torch.bool, device=device)
    for mask in tile.masks:
        mask.of(found).logical_and_(mask.factor != 0)
    return found


# Called in forward with a tile, the probabilities [b, g, queries, keys], summed over the heads of each group, and which
# of its queries they are of, bool [b, g, queries] (None: all).
Observer = Callable[[Tile, Tensor, Tensor | None], None]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """The function as it is outside of `torch.autocast`, which would round the terms of sums that are wide already.

    A backward needs it, too: it may be called inside of the region. The first tensor tells the device.
    """

    @wraps(function)
    def outside(*arguments: P.args, **named: P.kwargs) -> R:
        device = next(x.device.type for x in arguments if isinstance(x, Tensor))
        if device == "meta" or not torch.is_autocast_enabled(device):
            return function(*arguments, **named)
        with torch.autocast(device, enabled=False):
            return function(*arguments, **named)

    return outside


def by_group(x: Tensor, g: int) -> Tensor:
    """[b, t, h, ...] -> [b, g, t, heads of the group, ...], contiguous."""
    return x.unflatten(2, (g, -1)).transpose(1, 2).contiguous()


def from_group(x: Tensor) -> Tensor:
    """The inverse of `by_group`."""
    return x.transpose(1, 2).flatten(2, 3)


def lines(x: Tensor, tile: Tile) -> Tensor:
    """x [b, g, t, ...] of the tile's one row and group as a matrix, a line a query: indexing it is fast."""
    return x[tile.rows, tile.groups].flatten(0, 2).flatten(1)


def take_queries(x: Tensor, tile: Tile) -> Tensor:
    return x[tile.rows, tile.groups, tile.queries]


def put_queries(x: Tensor, tile: Tile, values: Tensor) -> None:
    if isinstance(tile.queries, slice):
        x[tile.rows, tile.groups, tile.queries] = values
    else:
        lines(x, tile).index_copy_(0, tile.queries, values.flatten(0, 2).flatten(1))


def add_queries(x: Tensor, tile: Tile, values: Tensor) -> None:
    if isinstance(tile.queries, slice):
        x[tile.rows, tile.groups, tile.queries] += values
    else:
        lines(x, tile).index_add_(0, tile.queries, values.flatten(0, 2).flatten(1))


def take_keys(x: Tensor, tile: Tile) -> Tensor:
    x = x[tile.rows, tile.groups]
    return x[:, :, tile.keys] if isinstance(tile.keys, slice) else x.index_select(2, tile.keys)


def add_keys(x: Tensor, tile: Tile, values: Tensor) -> None:
    x = x[tile.rows, tile.groups]
    if isinstance(tile.keys, slice):
        x[:, :, tile.keys] += values
    else:
        x.index_add_(2, tile.keys, values)


def are_finite(*tensors: Tensor) -> bool:
    """Whether no number of them is NaN or infinite; now and then false of very large ones."""
    with torch.no_grad():
        return all(math.isfinite(float(x.sum())) for x in tensors)
