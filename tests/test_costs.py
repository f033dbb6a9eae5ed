"""The counting formulas against counts of every pair."""

from typing import get_args

import pytest

from nsa.config import InfLLMv2Config, NSAConfig
from nsa.costs.devices import peak_of
from nsa.costs.flops import Shape, backward_flops, forward_flops, kernel_flops, limit_flops
from nsa.costs.keys import DenseReads, InfLLMv2Reads, NSAReads, Pairs, WindowReads, dense_pairs, pairs
from nsa.methods.registry import TRAINED, Attention, SparseAttention

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


def test_a_gpus_peak_is_found_by_its_name():
    names = {
        "NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA L40S": 362e12,
        "NVIDIA L40": None, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA A10": 125e12, "Tesla T4": None,
    }  # fmt: skip
    assert {name: peak_of(name) for name in names} == names


@pytest.mark.parametrize("method", TRAINED)
def test_the_last_query_reads_the_difference_of_two_sums(method):
    """At the end of a block, where the formula of one query and the exact sum agree."""
    reads = {
        "nsa": NSAReads(CONFIGS[1]),
        "infllm_v2": InfLLMv2Reads(
            InfLLMv2Config(kernel_size=4, kernel_stride=2, block_size=8, window_size=6, topk=3, dense_len=20)
        ),
        "dense": DenseReads(),
        "window": WindowReads(6),
    }[method]
    for length in range(8, 400, 8):
        every, before = reads.every(length), reads.every(length - 1)
        assert reads.last(length) == (every.attended - before.attended, every.scored - before.scored)


def test_the_names_of_options_are_those_of_the_registry():
    assert get_args(Attention) == tuple(TRAINED)
    assert get_args(SparseAttention) == tuple(name for name, method in TRAINED.items() if method.is_sparse)
