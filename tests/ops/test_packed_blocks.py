"""Blocks of packed sequences by index: the same as sequence by sequence, for any lengths."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from nsa.config import NSAConfig
from nsa.ops.compress import blocks_of
from nsa.ops.packed_blocks import PackedBlocks


@given(st.integers(1, 3), st.integers(1, 4), st.lists(st.integers(0, 14), min_size=1, max_size=6), st.integers(0, 3))
def test_blocks_and_their_gradient_are_those_of_each_sequence(strides, stride, lengths, empty):
    config = NSAConfig(compress_block_size=strides * stride, compress_stride=stride, select_block_size=strides * stride)
    total = sum(lengths)
    x = torch.randn(1, total, 2, 3, dtype=torch.float64, requires_grad=True)
    ends = torch.tensor([0, *lengths, *[0] * empty]).cumsum(0).to(torch.int32)
    expected = torch.cat([blocks_of(part, config) for part in x.split(lengths, dim=1)], dim=1)
    actual = PackedBlocks.of(ends, total, config).gather(x)
    count = expected.shape[1]
    assert actual.shape[1] == total // stride
    assert torch.equal(actual[:, :count], expected)
    assert not actual[:, count:].any()
    if count == 0:
        return
    weights = torch.randn_like(actual)
    (one,) = torch.autograd.grad(actual, x, weights, retain_graph=True)
    (two,) = torch.autograd.grad(expected, x, weights[:, :count])
    torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


def test_thousands_of_documents_around_a_block_long():
    config = NSAConfig(compress_block_size=8, compress_stride=4, select_block_size=8)
    lengths = [0, 1, 7, 8, 9, 23] * 500
    x = torch.randn(1, sum(lengths), 1, 2)
    blocks = PackedBlocks.of(torch.tensor([0, *lengths]).cumsum(0), x.shape[1], config)
    expected = torch.cat([blocks_of(part, config) for part in x.split(lengths, dim=1)], dim=1)
    assert torch.equal(blocks.gather(x)[:, : expected.shape[1]], expected)


def test_a_value_that_is_not_finite_stays_out_of_blocks_that_do_not_exist():
    config = NSAConfig(compress_block_size=8, compress_stride=4, select_block_size=8)
    x = torch.full((1, 14, 1, 2), torch.nan)
    assert not PackedBlocks.of(torch.tensor([0, 7, 14]), 14, config).gather(x).any()
