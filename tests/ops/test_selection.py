"""Importance and selection (eqs. 8 to 11): against the brute force by scores, by hand where ties decide."""

import math

import pytest
import torch
from branches import SMALL
from hypothesis import given
from hypothesis import strategies as st
from layouts import LAYOUTS, Layout
from torch import Tensor

from nsa.config import NSAConfig
from nsa.ops.compressed_attention import compressed_attention
from nsa.ops.selection import block_scores, compressed_attention_and_selection, select_blocks
from nsa.testing import INPUT_FAMILIES, InputShape, assert_same_selection, per_sequence
from nsa.testing import brute_force_selection as paper

EXACT = {"rtol": 0.0, "atol": 1e-10}


def inputs(
    layout: Layout, config: NSAConfig, *, family: str = "random", h: int = 4, g: int = 2, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """q and k_cmp."""
    num_blocks = layout.num_compressed_blocks(config)
    shape = InputShape(b=layout.b, t=layout.t, s=num_blocks, h=h, g=g, d=3, e=1)
    q, k_cmp, _ = INPUT_FAMILIES[family](torch.Generator().manual_seed(seed), shape)
    return q, k_cmp


def true_scores(layout: Layout, config: NSAConfig, q: Tensor, k_cmp: Tensor) -> Tensor:
    """Of every member in float64, padded with zeros to the number of blocks of the longest."""
    batch = layout.members(config)
    longest = max((paper.num_selection_blocks(member.length, config) for member in batch), default=0)

    def one(member) -> tuple[Tensor]:
        scores = paper.block_scores(member.queries(q), member.blocks(k_cmp), member.length, config)
        return (torch.nn.functional.pad(scores, (0, longest - scores.shape[-1])),)

    return per_sequence(batch, one)[0]


def check(layout: Layout, config: NSAConfig, q: Tensor, k_cmp: Tensor) -> None:
    """Scores to 1e-10 in float64, and in any dtype a selection that is right by them."""
    arguments = {"num_keys": layout.s, "sequences": layout.sequences()}
    scores = block_scores(q, k_cmp, config, **arguments)
    truth = true_scores(layout, config, q.double(), k_cmp.double())
    if q.dtype == torch.float64:
        torch.testing.assert_close(scores, truth, **EXACT)
    block_indices = select_blocks(q, k_cmp, config, **arguments)
    assert block_indices.dtype == torch.int32
    assert_same_selection(block_indices, truth, layout.positions(config), config, plain_scores=scores)


@pytest.mark.parametrize("tile_elements", [1 << 20, 60])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_brute_force_in_every_layout(monkeypatch, tile_elements, layout):
    monkeypatch.setattr("nsa.ops.tiles.TILE_ELEMENTS", tile_elements)
    check(LAYOUTS[layout], SMALL, *inputs(LAYOUTS[layout], SMALL))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", INPUT_FAMILIES)
def test_equals_the_brute_force_on_every_input_family_and_dtype(family, dtype):
    layout = Layout(t=100, s=100)
    check(layout, SMALL, *(x.to(dtype) for x in inputs(layout, SMALL, family=family)))


@pytest.mark.parametrize("group", [1, 2, 3, 4, 6, 8, 16])
def test_equals_the_brute_force_for_every_group_size(group):
    layout = LAYOUTS["packed suffixes"]
    check(layout, SMALL, *inputs(layout, SMALL, h=2 * group, g=2))


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 511, 512, 513])
def test_edge_lengths_with_the_papers_sizes(length):
    layout = Layout(t=length, s=length)
    check(layout, NSAConfig(num_selected_blocks=4), *inputs(layout, NSAConfig(), h=2, g=1))


@pytest.mark.parametrize("length", [1000, 4097])
def test_the_last_queries_of_longer_sequences(length):
    layout = Layout(t=9, s=length)
    check(layout, NSAConfig(), *inputs(layout, NSAConfig(), h=2, g=1))


@given(
    lengths=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), min_size=1, max_size=4),
    strides=st.integers(1, 3),
    more_strides=st.integers(0, 3),
    stride=st.integers(1, 4),
    initial_blocks=st.integers(1, 3),
    local_blocks=st.integers(1, 3),
    free_blocks=st.integers(0, 3),
    seed=st.integers(0, 9),
)
def test_equals_the_brute_force_for_any_sizes_and_lengths(
    lengths, strides, more_strides, stride, initial_blocks, local_blocks, free_blocks, seed
):
    config = NSAConfig(
        compress_block_size=strides * stride,
        compress_stride=stride,
        select_block_size=(strides + more_strides) * stride,
        num_selected_blocks=initial_blocks + local_blocks + free_blocks,
        num_initial_blocks=initial_blocks,
        num_local_blocks=local_blocks,
    )
    cu_q, cu_k = [0], [0]
    for some, more in lengths:
        cu_q.append(cu_q[-1] + min(some, more))
        cu_k.append(cu_k[-1] + max(some, more))
    layout = Layout(t=cu_q[-1], s=cu_k[-1], cu_seqlens_q=tuple(cu_q), cu_seqlens_k=tuple(cu_k))
    check(layout, config, *inputs(layout, config, seed=seed))


def test_scores_written_out_by_hand():
    # Logits 0, log 2, log 5 and their negatives: probabilities [1, 2, 5] / 8 and [10, 5, 2] / 17.
    config = NSAConfig(
        compress_block_size=4,
        compress_stride=2,
        select_block_size=4,
        num_selected_blocks=2,
        num_local_blocks=1,
    )
    k_cmp = torch.tensor([0.0, math.log(2), math.log(5)], dtype=torch.float64).view(1, 3, 1, 1)
    q = torch.tensor([1.0, -1.0], dtype=torch.float64).view(1, 1, 2, 1)
    scores = block_scores(q, k_cmp, config, num_keys=8)
    assert scores.flatten().tolist() == pytest.approx([4 / 8 + 25 / 17, 12 / 8 + 9 / 17], rel=1e-14)


def test_a_peak_on_one_compressed_block_selects_the_blocks_it_overlaps():
    # Compressed block 7 covers tokens 112 to 143: the last 16 of selection block 1, the first 16 of block 2.
    config = NSAConfig(num_selected_blocks=5)
    q = torch.full((1, 1, 1, 1), 50.0)
    k_cmp = torch.zeros(1, config.num_compressed_blocks(640), 1, 1)
    k_cmp[0, 7] = 1.0
    assert select_blocks(q, k_cmp, config, num_keys=640).flatten().tolist() == [0, 1, 2, 8, 9]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_ties_go_to_the_lower_block(dtype):
    # All keys equal: every block away from the ends scores exactly the same.
    config = NSAConfig(
        compress_block_size=2,
        compress_stride=2,
        select_block_size=2,
        num_selected_blocks=5,
        num_local_blocks=2,
    )
    q = torch.randn(1, 64, 2, 4).to(dtype)
    k_cmp = torch.randn(1, 1, 1, 4).expand(1, 32, 1, 4).to(dtype)
    block_indices = select_blocks(q, k_cmp, config)
    for position in range(64):
        own = position // 2
        expected = sorted({0, own - 1, own, *range(5)} & set(range(own + 1)))
        if own > 4:
            expected = [0, 1, 2, own - 1, own]
        expected += [-1] * (5 - len(expected))
        assert block_indices[0, position, 0].tolist() == expected


def test_attention_and_selection_in_one_pass_equal_the_two_apart():
    layout = LAYOUTS["packed suffixes"]
    q, k_cmp = inputs(layout, SMALL)
    v_cmp = torch.randn(*k_cmp.shape[:3], 5, dtype=torch.float64)
    arguments = {"num_keys": layout.s, "sequences": layout.sequences()}
    out, lse, block_indices = compressed_attention_and_selection(q, k_cmp, v_cmp, SMALL, **arguments)
    torch.testing.assert_close((out, lse), compressed_attention(q, k_cmp, v_cmp, SMALL, **arguments), **EXACT)
    assert torch.equal(block_indices, select_blocks(q, k_cmp, SMALL, **arguments))


def test_one_pass_has_the_gradient_of_the_attention_alone():
    q, k_cmp = inputs(LAYOUTS["whole"], SMALL)
    leaves = [x.requires_grad_() for x in (q, k_cmp, torch.randn_like(k_cmp))]
    out, lse, block_indices = compressed_attention_and_selection(*leaves, SMALL)
    assert not block_indices.requires_grad
    seen = lse.isfinite()
    actual = torch.autograd.grad(out.square().sum() + lse[seen].sum(), leaves)
    out, lse = compressed_attention(*leaves, SMALL)
    expected = torch.autograd.grad(out.square().sum() + lse[seen].sum(), leaves)
    torch.testing.assert_close(actual, expected, **EXACT)


@pytest.mark.parametrize("layout", ["packed suffixes", "ragged rows"])
def test_the_number_of_keys_is_not_needed_where_the_lengths_are_given(layout):
    layout = LAYOUTS[layout]
    q, k_cmp = inputs(layout, SMALL)
    for op in (select_blocks, block_scores):
        without = op(q, k_cmp, SMALL, sequences=layout.sequences())
        given = op(q, k_cmp, SMALL, num_keys=layout.s, sequences=layout.sequences())
        torch.testing.assert_close(without, given, **EXACT)


def test_the_future_changes_no_selection():
    layout = LAYOUTS["whole"]
    q, k_cmp = inputs(layout, SMALL)
    changed = k_cmp.clone()
    visible = SMALL.num_compressed_blocks(30)
    changed[:, visible:] = 100 * torch.randn_like(changed[:, visible:])
    before, after = select_blocks(q, k_cmp, SMALL), select_blocks(q, changed, SMALL)
    assert torch.equal(before[:, :30], after[:, :30])
    assert not torch.equal(before, after)


@pytest.mark.parametrize("op", [select_blocks, block_scores])
def test_an_empty_batch_selects_nothing(op):
    q, k_cmp = torch.zeros(0, 9, 2, 3), torch.zeros(0, SMALL.num_compressed_blocks(9), 1, 3)
    assert list(op(q, k_cmp, SMALL).shape[:3]) == [0, 9, 1]


def test_nan_in_a_query_still_selects_existing_blocks():
    layout = Layout(t=60, s=60)
    q, k_cmp = inputs(layout, SMALL)
    q[:, 50] = torch.nan
    picked = select_blocks(q, k_cmp, SMALL)[0, 50]
    assert ((picked >= 0) & (picked <= 50 // SMALL.select_block_size)).all()
    assert (picked[:, 1:] > picked[:, :-1]).all()


def test_a_wrong_number_of_compressed_blocks_is_one_clear_line():
    q, k_cmp = torch.zeros(1, 9, 2, 3), torch.zeros(1, 4, 1, 3)
    with pytest.raises(ValueError, match=r"expected 3 compressed blocks for 9 keys, got 4$"):
        select_blocks(q, k_cmp, SMALL)
