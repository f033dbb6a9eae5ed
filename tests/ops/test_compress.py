"""Compression (eq. 7): the blocks, the three phi, their gradients."""

import pytest
import torch
from branches import SMALL
from hypothesis import given
from hypothesis import strategies as st
from layouts import LAYOUTS, Layout
from torch import Tensor

from nsa.config import NSAConfig
from nsa.ops.compress import compress, phi_linear, phi_mean, phi_mlp
from nsa.testing import brute_force as paper

EXACT = {"rtol": 0.0, "atol": 1e-10}
L, D, M = SMALL.compress_block_size, 3, 5


def parameters(compression: str) -> list[Tensor]:
    """Random weights of a phi, in the order of its arguments."""
    shapes = {
        "mean": [],
        "linear": [(D, L * D)],
        "mlp": [(L, D), (M, L * D), (M,), (D, M), (D,)],
    }
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes[compression]]


OURS = {"mean": phi_mean, "linear": phi_linear, "mlp": phi_mlp}
PAPER = {"mean": paper.phi_mean, "linear": paper.phi_linear, "mlp": paper.phi_mlp}


def expected(x: Tensor, layout: Layout, config: NSAConfig, phi) -> Tensor:
    """Of every sequence's keys; packed blocks one after another."""
    rows: dict[int, list[Tensor]] = {}
    for member in layout.members(config):
        length = layout.s if layout.seqlens_k is not None else member.length
        keys = x[member.row, member.key_range.start : member.key_range.start + length]
        rows.setdefault(member.row, []).append(paper.compress(keys, config, phi))
    return torch.stack([torch.cat(parts) for parts in rows.values()])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("compression", OURS)
def test_equals_the_brute_force_in_every_layout(compression, layout):
    layout = LAYOUTS[layout]
    x = torch.randn(layout.b, layout.s, 2, D, dtype=torch.float64)
    weights = parameters(compression)
    actual = compress(x, lambda blocks: OURS[compression](blocks, *weights), SMALL, sequences=layout.sequences())
    truth = expected(x, layout, SMALL, lambda block: PAPER[compression](block, *weights))
    if layout.cu_seqlens_q is not None:
        assert actual.shape[1] == layout.s // SMALL.compress_stride  # as many as there can be, by shapes alone
        actual = actual[:, : truth.shape[1]]
    torch.testing.assert_close(actual, truth, **EXACT)


@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, 47, 48, 65])
def test_blocks_at_the_edges_of_the_papers_sizes(length):
    x = torch.randn(1, length, 1, 4, dtype=torch.float64)
    actual = compress(x, phi_mean, NSAConfig())
    assert actual.shape[1] == NSAConfig().num_compressed_blocks(length)
    torch.testing.assert_close(actual[0], paper.compress(x[0], NSAConfig(), paper.phi_mean), **EXACT)


@given(st.integers(1, 3), st.integers(1, 4), st.lists(st.integers(0, 20), min_size=1, max_size=4))
def test_packed_equals_separate_for_any_sizes(strides, stride, lengths):
    config = NSAConfig(compress_block_size=strides * stride, compress_stride=stride, select_block_size=strides * stride)
    x = torch.randn(1, sum(lengths), 2, 3, dtype=torch.float64)
    ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
    layout = Layout(t=sum(lengths), s=sum(lengths), cu_seqlens_q=tuple(ends))
    separate = [compress(part, phi_mean, config) for part in x.split(lengths, dim=1)]
    packed = compress(x, phi_mean, config, sequences=layout.sequences())
    expected = torch.cat(separate, dim=1)
    torch.testing.assert_close(packed[:, : expected.shape[1]], expected, **EXACT)
    assert not packed[:, expected.shape[1] :].any()


@pytest.mark.parametrize("layout", ["whole", "packed suffixes"])
@pytest.mark.parametrize("compression", OURS)
def test_gradcheck_of_the_tokens_and_of_every_weight(compression, layout):
    layout = Layout(t=11, s=11) if layout == "whole" else Layout(t=13, s=13, cu_seqlens_q=(0, 3, 9, 13))
    x = torch.randn(1, layout.s, 1, D, dtype=torch.float64, requires_grad=True)
    weights = [weight.requires_grad_() for weight in parameters(compression)]

    def differentiable(x: Tensor, *weights: Tensor) -> Tensor:
        def phi(blocks: Tensor) -> Tensor:
            return OURS[compression](blocks, *weights)

        return compress(x, phi, SMALL, sequences=layout.sequences())

    assert torch.autograd.gradcheck(differentiable, (x, *weights))


def test_an_mlp_with_a_zero_last_layer_is_the_mean():
    blocks = torch.randn(2, 7, L, D, dtype=torch.float64)
    encoding, weight_in, bias_in, weight_out, bias_out = parameters("mlp")
    actual = phi_mlp(blocks, encoding, weight_in, bias_in, 0 * weight_out, 0 * bias_out)
    torch.testing.assert_close(actual, phi_mean(blocks), **EXACT)


def test_the_order_of_tokens_matters_to_linear_and_mlp_and_not_to_the_mean():
    blocks = torch.randn(1, L, D, dtype=torch.float64)
    for compression in OURS:
        phi = OURS[compression]
        weights = parameters(compression)
        same = torch.allclose(phi(blocks, *weights), phi(blocks.flip(1), *weights))
        assert same == (compression == "mean")


def test_nan_stays_in_the_blocks_that_hold_it():
    x = torch.randn(1, 12, 1, D, dtype=torch.float64)
    x[0, 4] = torch.nan
    spoiled = compress(x, phi_mean, SMALL)[0, :, 0].isnan().all(-1)
    assert spoiled.tolist() == [False, True, True, False, False]


@pytest.mark.usefixtures("without_shape_checks")
def test_one_dimension_too_few_is_one_clear_line():
    with pytest.raises(ValueError, match=r"^compress: x should have shape \[b, s, g, d\], got \[12, 1, 3\]$"):
        compress(torch.zeros(12, 1, 3), phi_mean, SMALL)
