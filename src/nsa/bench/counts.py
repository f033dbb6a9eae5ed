"""What must be computed, counted from the configuration: the limit that a measured time is set beside.

A product is one multiply-add for each element of a head's width and each (query, key) pair of a head. Forward needs
two a pair (q k^T and p v), backward five (q k^T again, dO v^T, dq, dk, dv); the importance of blocks needs none of its
own where it comes out of the compressed branch's pass, and one more (q k^T) where it takes a pass by itself.
"""

from dataclasses import dataclass

from nsa.config import NSAConfig


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One sequence of `length` tokens; h query heads in groups over g KV heads of widths d (keys) and e (values)."""

    length: int
    h: int = 64
    g: int = 4
    d: int = 128
    e: int = 128


@dataclass(frozen=True)
class Pairs:
    """(query, key) pairs that one query head sees."""

    compressed: int
    selected: int
    window: int

    @property
    def total(self) -> int:
        return self.compressed + self.selected + self.window


def dense_pairs(length: int) -> int:
    """1 + 2 + ... + length."""
    return length * (length + 1) // 2


def pairs(length: int, config: NSAConfig) -> Pairs:
    """Pairs of the three branches in a sequence, causal."""
    # A compressed block i is seen by every query from i * stride + its size - 1 on.
    c = config.num_compressed_blocks(length)
    compressed = c * (length - config.compress_block_size + 1) - config.compress_stride * c * (c - 1) // 2
    # A query in block o selects min(o + 1, n) blocks: its own up to itself, the others whole.
    size, n = config.select_block_size, config.num_selected_blocks
    whole, rest = divmod(length, size)
    own = whole * dense_pairs(size) + dense_pairs(rest)
    others = size * (size * _sum_of_smallest(whole, n - 1) + rest * min(whole, n - 1))
    w = min(config.window_size, length)
    window = dense_pairs(w) + (length - w) * w
    return Pairs(compressed, own + others, window)


def _sum_of_smallest(count: int, cap: int) -> int:
    """min(0, cap) + min(1, cap) + ... over `count` terms."""
    rising = min(count, cap + 1)
    return rising * (rising - 1) // 2 + (count - rising) * cap


def forward_flops(shape: Shape, seen: int, *, keys: int = 1, values: int = 1) -> int:
    """FLOPs of `keys` products over the width d and `values` over e, for pairs `seen` by each head."""
    return 2 * shape.h * seen * (keys * shape.d + values * shape.e)


def backward_flops(shape: Shape, seen: int) -> int:
    """Five products: q k^T, dq and dk over the width d, dO v^T and dv over e."""
    return forward_flops(shape, seen, keys=3, values=2)


def limit_flops(shape: Shape, config: NSAConfig) -> dict[str, int]:
    """The least that NSA and dense attention compute, forward and backward."""
    sparse, dense = pairs(shape.length, config).total, dense_pairs(shape.length)
    return {
        "forward": forward_flops(shape, sparse),
        "backward": backward_flops(shape, sparse),
        "dense forward": forward_flops(shape, dense),
        "dense backward": backward_flops(shape, dense),
    }


def kernel_flops(shape: Shape, config: NSAConfig) -> dict[str, int]:
    """The least of each kernel that `nsa bench kernels` times alone and that multiplies matrices."""
    seen = pairs(shape.length, config)
    return {
        "forward: compressed": forward_flops(shape, seen.compressed),
        "forward: selection": forward_flops(shape, seen.compressed, values=0),
        "forward: selected": forward_flops(shape, seen.selected),
        "forward: window": forward_flops(shape, seen.window),
        "backward: compressed": backward_flops(shape, seen.compressed),
        "backward: window": backward_flops(shape, seen.window),
        # Groups of few heads have one kernel; elsewhere two without atomics recompute the scores and dO v^T: 3 products
        # and 4.
        "backward: selected": backward_flops(shape, seen.selected),
        "backward: selected dq": forward_flops(shape, seen.selected, keys=2, values=1),
        "backward: selected dk, dv": forward_flops(shape, seen.selected, keys=2, values=2),
    }
