"""The brute force itself, against hand-computed numbers, dense attention and the other form of eq. 9."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsa.config import NSAConfig
from nsa.testing import (
    INPUT_FAMILIES,
    InputShape,
    assert_close_to_fp64,
    assert_same_selection,
    members,
    per_sequence,
)
from nsa.testing import brute_force as paper
from nsa.testing import brute_force_selection as selection

SMALL = NSAConfig(compress_block_size=4, compress_stride=2, select_block_size=8, num_selected_blocks=3, window_size=5)


def inputs(generator: torch.Generator, family: str = "random", **sizes: int):
    shape = InputShape(**{"b": 1, "t": 40, "s": 40, "h": 4, "g": 2, "d": 3, "e": 5} | sizes)
    return tuple(x[0] for x in INPUT_FAMILIES[family](generator, shape))


# ---- positions, blocks, visibility ---------------------------------------------------------------------


def test_queries_are_the_last_positions():
    assert selection.query_positions(3, 10) == [7, 8, 9]
    assert selection.query_positions(3, 1) == [-2, -1, 0]


def test_compression_blocks_of_a_tiny_sequence():
    assert [list(block) for block in selection.compression_blocks(9, SMALL)] == [
        [0, 1, 2, 3],
        [2, 3, 4, 5],
        [4, 5, 6, 7],
    ]
    assert selection.compression_blocks(3, SMALL) == []


def test_a_compressed_block_is_visible_from_its_last_token_on():
    assert [selection.visible_compressed(position, 9, SMALL) for position in range(9)] == [
        [],
        [],
        [],
        [0],
        [0],
        [0, 1],
        [0, 1],
        [0, 1, 2],
        [0, 1, 2],
    ]


def test_the_window_holds_exactly_w_keys_and_the_own_one():
    assert paper.visible_window(9, 20, 5) == [5, 6, 7, 8, 9]
    assert paper.visible_window(2, 20, 5) == [0, 1, 2]
    assert paper.visible_window(-1, 20, 5) == []


def test_selected_keys_end_at_the_query():
    assert paper.visible_selected(17, 40, [0, 2, -1], SMALL) == [*range(8), 16, 17]


# ---- eq. 9 ---------------------------------------------------------------------------------------------


def test_importance_of_the_papers_sizes_is_the_overlap_1_2_2_2_1():
    config = NSAConfig()
    for j in range(1, 3):
        for i in range(12):
            p_cmp = [float(i == other) for other in range(12)]
            expected = {4 * j - 1: 1.0, 4 * j: 2.0, 4 * j + 1: 2.0, 4 * j + 2: 2.0, 4 * j + 3: 1.0}.get(i, 0.0)
            assert selection.importance_by_overlap(p_cmp, 3, config)[j] == expected


def test_importance_is_p_cmp_itself_when_all_sizes_are_equal():
    config = NSAConfig(compress_block_size=16, compress_stride=16, select_block_size=16)
    p_cmp = [0.5, 0.125, 0.25, 0.125]
    assert selection.importance_by_overlap(p_cmp, 4, config) == p_cmp
    assert selection.importance_by_formula(p_cmp, 4, config) == p_cmp


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 40), st.randoms(use_true_random=False))
def test_importance_from_token_ranges_equals_the_printed_sum(strides, extra, num_compressed, random):
    config = NSAConfig(compress_block_size=2 * strides, compress_stride=2, select_block_size=2 * (strides + extra))
    p_cmp = [random.random() for _ in range(num_compressed)]
    num_blocks = random.randrange(20)
    assert selection.importance_by_formula(p_cmp, num_blocks, config) == pytest.approx(
        selection.importance_by_overlap(p_cmp, num_blocks, config), abs=0, rel=1e-14
    )


# ---- selection -----------------------------------------------------------------------------------------


def test_selection_takes_the_forced_blocks_and_the_best_of_the_rest():
    config = NSAConfig(
        compress_block_size=4,
        compress_stride=2,
        select_block_size=8,
        num_selected_blocks=5,
        num_local_blocks=2,
    )
    scores = [0.0, 0.3, 0.1, 0.9, 0.2, 0.0, 0.0, 9.0]
    assert selection.select(scores, 6 * 8, config) == [0, 1, 3, 5, 6]
    assert selection.select(scores, 5 * 8 + 7, config) == [0, 1, 3, 4, 5]
    assert selection.select(scores, 9, config) == [0, 1, -1, -1, -1]
    assert selection.select(scores, 0, config) == [0, -1, -1, -1, -1]
    assert selection.select(scores, -1, config) == [-1] * 5


def test_equal_scores_go_to_the_lower_block():
    config = NSAConfig(num_selected_blocks=5)
    assert selection.select([0.0, 1.0, 2.0, 1.0, 1.0, 1.0, 0.0, 0.0], 7 * 64, config) == [0, 1, 2, 6, 7]


def test_scores_add_the_heads_of_a_group():
    # Two heads whose softmax over the three compressed blocks of 8 tokens can be written down.
    config = NSAConfig(
        compress_block_size=4,
        compress_stride=2,
        select_block_size=4,
        num_selected_blocks=2,
        num_local_blocks=1,
    )
    k_cmp = torch.tensor([0.0, math.log(2), math.log(5)], dtype=torch.float64).view(3, 1, 1)
    q = torch.tensor([1.0, -1.0], dtype=torch.float64).view(1, 2, 1)  # at position 7
    # Probabilities [1, 2, 5] / 8 and [10, 5, 2] / 17; block 0 is 2 p0 + p1, block 1 is p1 + 2 p2.
    expected = [4 / 8 + 25 / 17, 12 / 8 + 9 / 17]
    assert selection.block_scores(q, k_cmp, 8, config)[0, 0].tolist() == pytest.approx(expected, rel=1e-15)


# ---- attention -----------------------------------------------------------------------------------------


def test_attention_of_a_tiny_sequence_written_out():
    q = torch.tensor([[[1.0]], [[2.0]]], dtype=torch.float64)
    k = torch.tensor([[[0.0]], [[math.log(3)]]], dtype=torch.float64)
    v = torch.tensor([[[10.0, 1.0]], [[20.0, 2.0]]], dtype=torch.float64)
    out, lse = paper.window_attention(q, k, v, window_size=2)
    # Weights 1 : 0, then 1 : 3 squared.
    assert out[:, 0].tolist() == [pytest.approx([10.0, 1.0]), pytest.approx([19.0, 1.9])]
    assert lse[:, 0].tolist() == pytest.approx([0.0, math.log(10.0)])
    out, lse = paper.window_attention(q, k, v, window_size=1)
    assert out[:, 0].tolist() == [pytest.approx([10.0, 1.0]), pytest.approx([20.0, 2.0])]


def test_phi_mean_of_a_tiny_sequence():
    x = torch.arange(8, dtype=torch.float64).view(8, 1, 1)
    assert paper.compress(x, SMALL, paper.phi_mean).flatten().tolist() == [1.5, 3.5, 5.5]


@pytest.mark.parametrize("num_queries", [40, 7, 1])
def test_dense_attention_is_torchs(generator, num_queries):
    q, k, v = inputs(generator, t=num_queries)
    mask = torch.ones(num_queries, 40, dtype=torch.bool).tril(40 - num_queries)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1), *(x.repeat_interleave(2, 1).transpose(0, 1) for x in (k, v)), attn_mask=mask
    )
    torch.testing.assert_close(paper.dense_attention(q, k, v)[0], expected.transpose(0, 1), rtol=0, atol=1e-14)


def test_all_blocks_selected_is_dense(generator):
    q, k, v = inputs(generator)
    config = NSAConfig(
        compress_block_size=4, compress_stride=2, select_block_size=8, num_selected_blocks=5, window_size=5
    )
    scores = paper.block_scores(q, paper.compress(k, config, paper.phi_mean), 40, config)
    blocks = paper.select_blocks(scores, 40, config)
    dense = paper.dense_attention(q, k, v)
    torch.testing.assert_close(paper.selected_attention(q, k, v, blocks, config), dense, rtol=0, atol=1e-14)


def test_a_window_over_everything_is_dense(generator):
    q, k, v = inputs(generator)
    torch.testing.assert_close(paper.window_attention(q, k, v, 40), paper.dense_attention(q, k, v), rtol=0, atol=1e-14)


def test_queries_without_visible_keys_give_zero(generator):
    q, k, v = inputs(generator, s=3, t=5)
    out, lse = paper.window_attention(q, k, v, 4)
    assert (out[:2] == 0).all()
    assert (lse[:2] == -math.inf).all()
    out, lse = paper.compressed_attention(q, k[:0], v[:0], 3, SMALL)
    assert (out == 0).all()
    assert (lse == -math.inf).all()


@pytest.mark.parametrize("branch", range(3))
def test_a_one_hot_gate_isolates_its_branch(generator, branch):
    q, k, v = inputs(generator)
    gates = torch.zeros(40, 4, 3, dtype=torch.float64)
    gates[..., branch] = 1
    k_cmp, v_cmp = (paper.compress(x, SMALL, paper.phi_mean) for x in (k, v))
    blocks = paper.select_blocks(paper.block_scores(q, k_cmp, 40, SMALL), 40, SMALL)
    expected = (
        paper.compressed_attention(q, k_cmp, v_cmp, 40, SMALL),
        paper.selected_attention(q, k, v, blocks, SMALL),
        paper.window_attention(q, k, v, 5),
    )[branch][0]
    assert torch.equal(paper.native_sparse_attention(q, k, v, gates, SMALL), expected)


# ---- batches -------------------------------------------------------------------------------------------


def test_members_of_packed_and_ragged_batches():
    packed = members(1, 9, 20, SMALL, cu_seqlens_q=[0, 4, 4, 9], cu_seqlens_k=[0, 9, 9, 20])
    assert [(m.row, m.query_range, m.key_range, m.block_range) for m in packed] == [
        (0, slice(0, 4), slice(0, 9), slice(0, 3)),
        (0, slice(4, 4), slice(9, 9), slice(3, 3)),
        (0, slice(4, 9), slice(9, 20), slice(3, 7)),
    ]
    ragged = members(2, 4, 9, SMALL, seqlens_k=[9, 2])
    assert [(m.row, m.query_range, m.key_range, m.block_range) for m in ragged] == [
        (0, slice(0, 4), slice(0, 9), slice(0, 3)),
        (1, slice(0, 4), slice(0, 2), slice(0, 0)),
    ]


def test_outputs_of_members_are_put_back_in_place():
    x = torch.arange(9.0).view(1, 9)
    (out,) = per_sequence(members(1, 9, 9, SMALL, cu_seqlens_q=[0, 4, 4, 9]), lambda m: (m.queries(x),))
    assert torch.equal(out, x)
    x = torch.arange(6.0).view(2, 3)
    (out,) = per_sequence(members(2, 3, 5, SMALL), lambda m: (m.queries(x) + m.length,))
    assert torch.equal(out, x + 5)


# ---- input families ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", INPUT_FAMILIES)
def test_families_have_the_shapes_asked_for_and_repeat(family):
    shape = InputShape(b=2, t=5, s=9, h=4, g=2, d=3, e=7)
    first, second = (INPUT_FAMILIES[family](torch.Generator().manual_seed(1), shape) for _ in range(2))
    assert [list(x.shape) for x in first] == [[2, 5, 4, 3], [2, 9, 2, 3], [2, 9, 2, 7]]
    assert all(x.dtype == torch.float64 for x in first)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_families_are_what_their_names_say(generator):
    sizes = {"t": 400, "s": 400, "h": 1, "g": 1, "d": 32, "e": 32}

    def largest_probability(family: str) -> torch.Tensor:
        q, k, _ = inputs(generator, family, **sizes)
        return torch.softmax(q[:, 0] @ k[:, 0].T / 32**0.5, dim=-1).amax(-1).mean()

    assert largest_probability("peaked") > 0.5
    assert largest_probability("near_uniform") < 1.2 / 400
    _, k, _ = inputs(generator, "tied", **sizes)
    assert (k == k[:1]).all()
    q, k, v = inputs(generator, "correlated", **sizes)
    for x in (q, k, v):
        assert 0.9 < float((x[1:] * x[:-1]).mean() / x.square().mean()) < 1.0


# ---- comparisons ---------------------------------------------------------------------------------------


def test_the_error_budget_is_twice_plain_pytorchs_error(generator):
    truth = torch.randn(1000, generator=generator, dtype=torch.float64)
    plain = truth.float() + 1e-3
    assert_close_to_fp64(truth.float() + 1.99e-3, plain, truth)
    with pytest.raises(AssertionError, match=r"result: largest error 0\.0021 exceeds the budget 0\.002"):
        assert_close_to_fp64(truth.float() + 2.1e-3, plain, truth)


def test_an_error_that_is_spread_out_exceeds_the_root_mean_square_budget(generator):
    truth = torch.randn(1000, generator=generator, dtype=torch.float64)
    plain = truth.float()
    plain[0] += 1.0
    with pytest.raises(AssertionError, match="root mean square error"):
        assert_close_to_fp64(truth.float() + 0.5, plain, truth)


def test_rounding_alone_is_within_the_budget(generator):
    truth = torch.randn(1000, generator=generator, dtype=torch.float64)
    plain = truth.bfloat16()
    assert_close_to_fp64(plain, plain, plain.double())
    assert_close_to_fp64(truth.bfloat16(), plain, truth)


def test_nan_never_passes():
    good, bad = torch.ones(3), torch.tensor([1.0, torch.nan, 1.0])
    for trio in ((bad, good, good), (good, bad, good), (good, good, bad), (bad, bad, bad)):
        with pytest.raises(AssertionError, match=r"1 of 3 elements of .* are NaN"):
            assert_close_to_fp64(trio[0], trio[1], trio[2].double())


def test_infinities_must_be_where_the_truth_has_them():
    truth = torch.tensor([1.0, -torch.inf], dtype=torch.float64)
    assert_close_to_fp64(truth.float(), truth.float(), truth)
    for wrong in ([1.0, 0.0], [-torch.inf, -torch.inf], [1.0, torch.inf]):
        with pytest.raises(AssertionError, match="infinities of actual"):
            assert_close_to_fp64(torch.tensor(wrong), truth.float(), truth)


SELECTION = NSAConfig(select_block_size=64, num_selected_blocks=4)
SCORES = torch.tensor([0.0, 0.3, 0.1, 0.9, 0.3, 0.0, 0.0], dtype=torch.float64).view(1, 1, 1, 7)


@pytest.mark.parametrize("picks", [[0, 3, 5, 6]])
def test_a_right_selection_passes(picks):
    check_selection(picks)


@pytest.mark.parametrize(
    ("picks", "rule"),
    [
        ([0, 1, 5, 6], "free picks score as high as the best"),
        ([3, 4, 5, 6], "forced blocks are selected"),
        ([0, 3, 4, 6], "forced blocks are selected"),
        ([0, 5, 3, 6], "blocks ascend without repeats"),
        ([0, 3, 3, 6], "blocks ascend without repeats"),
        ([0, 5, 6, -1], "as many blocks as exist"),
        ([-1, 0, 5, 6], "-1 comes last"),
        ([0, 5, 6, -2], "an empty slot is -1"),
        ([0, 5, 6, 7], "no block after the query's own"),
    ],
)
def test_a_wrong_selection_fails_with_the_rule_it_breaks(picks, rule):
    with pytest.raises(AssertionError, match=rule):
        check_selection(picks)


def test_either_of_two_equal_scores_passes():
    config = NSAConfig(num_selected_blocks=5)
    for picks in ([0, 1, 3, 5, 6], [0, 3, 4, 5, 6]):
        check_selection(picks, config)


def test_padding_selects_nothing():
    check_selection([-1] * 4, position=-3)
    with pytest.raises(AssertionError, match="as many blocks as exist"):
        check_selection([0, -1, -1, -1], position=-3)


def check_selection(picks: list[int], config: NSAConfig = SELECTION, position: int = 6 * 64) -> None:
    indices = torch.tensor(picks, dtype=torch.int32).view(1, 1, 1, -1)
    assert_same_selection(indices, SCORES, torch.tensor([[position]]), config, plain_scores=SCORES.float())
