"""Batches for the brute force: uniform, packed and ragged rows are loops over single sequences."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from nsa.config import NSAConfig
from nsa.testing.brute_force_selection import compression_blocks


@dataclass(frozen=True)
class Member:
    """One sequence of a batch: its row, and its part of the query, key and compressed dimensions."""

    row: int
    query_range: slice
    key_range: slice
    block_range: slice

    @property
    def length(self) -> int:
        return self.key_range.stop - self.key_range.start

    def queries(self, x: Tensor) -> Tensor:
        """[b, t, ...] -> this member's [t, ...]."""
        return x[self.row, self.query_range]

    def keys(self, x: Tensor) -> Tensor:
        """[b, s, ...] -> this member's [s, ...]."""
        return x[self.row, self.key_range]

    def blocks(self, x: Tensor) -> Tensor:
        """[b, c, ...] -> this member's [c, ...]."""
        return x[self.row, self.block_range]


def members(
    b: int,
    t: int,
    s: int,
    config: NSAConfig,
    *,
    cu_seqlens_q: list[int] | None = None,
    cu_seqlens_k: list[int] | None = None,
    seqlens_k: list[int] | None = None,
) -> list[Member]:
    """The sequences of a batch: its rows, the parts of a packed row, or rows with seqlens_k[r] keys each."""
    found = []
    if cu_seqlens_q is not None:
        block = 0
        cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        for queries, keys in zip(pairwise(cu_seqlens_q), pairwise(cu_seqlens_k), strict=True):
            num_blocks = len(compression_blocks(keys[1] - keys[0], config))
            found.append(Member(0, slice(*queries), slice(*keys), slice(block, block + num_blocks)))
            block += num_blocks
        return found
    for row in range(b):
        length = s if seqlens_k is None else seqlens_k[row]
        num_blocks = len(compression_blocks(length, config))
        found.append(Member(row, slice(0, t), slice(0, length), slice(0, num_blocks)))
    return found


def per_sequence(batch: list[Member], function: Callable[[Member], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The function's outputs [t, ...] of every member, put together to [b, t, ...]."""
    rows = sorted({member.row for member in batch})
    outputs = [[function(member) for member in batch if member.row == row] for row in rows]
    return tuple(
        torch.stack([torch.cat([parts[i] for parts in row]) for row in outputs]) for i in range(len(outputs[0][0]))
    )
