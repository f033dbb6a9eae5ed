"""Where sequences lie, as the kernels see it: tensors on the device, never a host synchronisation.

A kernel's program works on one tile of one sequence. In a uniform or ragged batch the tile's number and the row of the
batch are grid coordinates; in a packed batch a map from tile number to sequence, built on the device, says whose it is,
and the grid is as large as it can get (tiles past the end return at once).
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from nsa.kernels.integers import cdiv
from nsa.kernels.tile_map import block_starts, tile_map

UNIFORM, PACKED, RAGGED = 0, 1, 2


@dataclass(frozen=True)
class TileMap:
    """How many tiles to launch, and for packed sequences whose each one is."""

    count: int
    sequence: Tensor | None = None  # int32 [count]
    first: Tensor | None = None  # int32 [sequences + 1]: number of each sequence's first tile


@dataclass(frozen=True)
class Layout:
    """b rows, t queries, s raw keys (a bound where lengths are given), and one key every `stride` of `block` tokens."""

    b: int
    t: int
    s: int
    block: int = 1
    stride: int = 1
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    seqlens_k: Tensor | None = None
    max_keys: int = 0  # a bound on the raw keys of one packed sequence, where one is known; it is trusted
    # What was worked out of cu_seqlens once; layouts of the same sequences (`replace`) share it.
    maps: dict[tuple[int, ...], TileMap] = field(default_factory=dict, repr=False, compare=False)

    @property
    def kind(self) -> int:
        if self.cu_seqlens_q is not None:
            return PACKED
        return UNIFORM if self.seqlens_k is None else RAGGED

    @property
    def longest(self) -> int:
        """A bound on the raw keys of any sequence."""
        return min(self.max_keys or self.s, self.s)

    @cached_property
    def cu_q(self) -> Tensor | None:
        return None if self.cu_seqlens_q is None else self.cu_seqlens_q.to(torch.int32)

    @cached_property
    def cu_k(self) -> Tensor | None:
        return self.cu_q if self.cu_seqlens_k is None else self.cu_seqlens_k.to(torch.int32)

    @cached_property
    def lengths(self) -> Tensor | None:
        return None if self.seqlens_k is None else self.seqlens_k.to(torch.int32)

    @cached_property
    def key_start(self) -> Tensor | None:
        """Where each packed sequence's keys (compressed or raw) begin, int32 [sequences + 1]."""
        if self.cu_k is None or self.stride == self.block == 1:
            return self.cu_k
        return block_starts(self.cu_k, self.block, self.stride)

    @cached_property
    def arguments(self) -> tuple[Tensor | None, ...]:
        """What `tiles.locate` loads from."""
        if self.kind == UNIFORM:
            return (None,) * 4
        return self.cu_q, self.cu_k, self.key_start, self.lengths

    def query_tiles(self, size: int) -> TileMap:
        return self._tiles((self.t, size), self.cu_q)

    def key_tiles(self, num_keys: int, size: int) -> TileMap:
        return self._tiles((num_keys, size, self.block, self.stride), self.key_start)

    def _tiles(self, of: tuple[int, ...], starts: Tensor | None) -> TileMap:
        total, size = of[:2]
        if starts is None:
            return TileMap(cdiv(total, size))
        if of not in self.maps:
            count = cdiv(total, size) + len(starts) - 1
            self.maps[of] = TileMap(count, *tile_map(starts, count, size))
        return self.maps[of]
