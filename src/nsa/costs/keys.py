"""Keys that queries read, by the sizes of each method: what bytes and operations are counted from.

`last(length)` is of the last of `length` positions: the paper's s/d + n l' + w, cut to what exists, where the query's
own block counts as full. `every(length)` is the sum over all positions, and exact: of its own block a query reads the
keys up to itself.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from nsa.config import InfLLMv2Config, NSAConfig


class Read(NamedTuple):
    """Keys with their values, and keys alone that are scored only to choose."""

    attended: int
    scored: int = 0

    @property
    def keys(self) -> int:
        return self.attended + self.scored


class Reads(Protocol):
    def last(self, length: int) -> Read: ...
    def every(self, length: int) -> Read: ...


class DenseReads:
    """Every key up to the query."""

    def last(self, length: int) -> Read:
        return Read(length)

    def every(self, length: int) -> Read:
        return Read(dense_pairs(length))


@dataclass(frozen=True)
class WindowReads:
    """The last `size` keys."""

    size: int

    def last(self, length: int) -> Read:
        return Read(min(length, self.size))

    def every(self, length: int) -> Read:
        return Read(window_pairs(length, self.size))


@dataclass(frozen=True)
class NSAReads:
    """Compressed keys, selected blocks and the window; a compressed key counts as one."""

    config: NSAConfig

    def last(self, length: int) -> Read:
        return Read(self.config.keys_per_query(length))

    def every(self, length: int) -> Read:
        return Read(pairs(length, self.config).total)


@dataclass(frozen=True)
class InfLLMv2Reads:
    """All keys up to `sees_all` of them; then the blocks on the list, and the pooled keys to choose them."""

    config: InfLLMv2Config

    def last(self, length: int) -> Read:
        pooled = self.config.blocks.num_compressed_blocks(length) if length > self.config.sees_all else 0
        return Read(self.config.keys_per_query(length) - pooled, pooled)

    def every(self, length: int) -> Read:
        blocks, dense = self.config.blocks, min(length, self.config.sees_all)
        listed = selected_pairs(length, blocks) - selected_pairs(dense, blocks)
        return Read(dense_pairs(dense) + listed, compressed_pairs(length, blocks) - compressed_pairs(dense, blocks))


# ---- (query, key) pairs of a sequence, causal ----


@dataclass(frozen=True)
class Pairs:
    """Those that one query head of NSA sees, by branch."""

    compressed: int
    selected: int
    window: int

    @property
    def total(self) -> int:
        return self.compressed + self.selected + self.window


def pairs(length: int, config: NSAConfig) -> Pairs:
    return Pairs(
        compressed_pairs(length, config), selected_pairs(length, config), window_pairs(length, config.window_size)
    )


def dense_pairs(length: int) -> int:
    """1 + 2 + ... + length."""
    return length * (length + 1) // 2


def window_pairs(length: int, size: int) -> int:
    rising = min(length, size)
    return dense_pairs(rising) + (length - rising) * rising


def compressed_pairs(length: int, config: NSAConfig) -> int:
    """A compressed block i is seen by every query from i * stride + its size - 1 on."""
    c = config.num_compressed_blocks(length)
    return c * (length - config.compress_block_size + 1) - config.compress_stride * c * (c - 1) // 2


def selected_pairs(length: int, config: NSAConfig) -> int:
    """A query in block o selects min(o + 1, n) blocks: its own up to itself, the others whole."""
    size, n = config.select_block_size, config.num_selected_blocks
    whole, rest = divmod(length, size)
    own = whole * dense_pairs(size) + dense_pairs(rest)
    return own + size * (size * _sum_of_smallest(whole, n - 1) + rest * min(whole, n - 1))


def _sum_of_smallest(count: int, cap: int) -> int:
    """min(0, cap) + min(1, cap) + ... over `count` terms."""
    rising = min(count, cap + 1)
    return rising * (rising - 1) // 2 + (count - rising) * cap
