"""The counting formulas against counts of every pair."""

import pytest

from nsa.bench.counts import Pairs, Shape, backward_flops, dense_pairs, forward_flops, kernel_flops, limit_flops, pairs
from nsa.config import NSAConfig

CONFIGS = (
    NSAConfig(),
    NSAConfig(compress_block_size=4, compress_stride=2, select_block_size=8, num_selected_blocks=4, window_size=6),
    NSAConfig(compress_block_size=6, compress_stride=2, select_block_size=6, num_selected_blocks=5, window_size=1),
    NSAConfig(compress_block_size=8, compress_stride=8, select_block_size=16, num_selected_blocks=3, window_size=300),
)


def counted(length: int, config: NSAConfig) -> Pairs:
    """Query by query, key by key."""
    compressed = selected = window = 0
    for position in range(length):
        for start in range(0, length, config.compress_stride):
            compressed += start + config.compress_block_size - 1 <= position
        own = position // config.select_block_size
        blocks = [own, *range(own)][: config.num_selected_blocks]
        selected += sum(key <= position for key in range(length) if key // config.select_block_size in blocks)
        window += sum(position - config.window_size < key <= position for key in range(length))
    return Pairs(compressed, selected, window)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"l{c.compress_block_size}n{c.num_selected_blocks}")
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 31, 48, 100, 190])
def test_pairs_are_those_counted_one_by_one(length: int, config: NSAConfig) -> None:
    assert pairs(length, config) == counted(length, config)


def test_pairs_past_all_limits_of_the_papers_sizes() -> None:
    config = NSAConfig(compress_block_size=2, compress_stride=1, select_block_size=4, num_selected_blocks=3)
    assert pairs(700, config) == counted(700, config)


def test_dense_sees_every_earlier_key() -> None:
    assert dense_pairs(50) == sum(key <= query for query in range(50) for key in range(50))


def test_flops_are_two_for_each_multiply_add() -> None:
    shape = Shape(length=10, h=3, g=1, d=5, e=7)
    assert forward_flops(shape, 11) == 3 * 11 * (2 * 5 + 2 * 7)
    assert backward_flops(shape, 11) == 3 * 11 * 2 * (5 + 5 + 5 + 7 + 7)


def test_the_limit_is_the_sum_of_the_branches() -> None:
    shape, config = Shape(length=5000, d=64, e=96), NSAConfig()
    kernels, limits = kernel_flops(shape, config), limit_flops(shape, config)
    branches = ("compressed", "selected", "window")
    assert limits["forward"] == sum(kernels[f"forward: {branch}"] for branch in branches)
    assert limits["dense backward"] == backward_flops(shape, dense_pairs(5000))
