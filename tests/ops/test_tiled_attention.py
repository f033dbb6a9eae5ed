"""What holds for each of the three attentions, in every tiling."""

import math
from dataclasses import replace

import pytest
import torch
from branches import BRANCHES, SMALL, Branch
from hypothesis import given
from hypothesis import strategies as st
from layouts import LAYOUTS, Layout

from nsa.config import NSAConfig
from nsa.testing import INPUT_FAMILIES, assert_close_to_fp64

EXACT = {"rtol": 0.0, "atol": 1e-10}  # of float64 results


@pytest.fixture(params=BRANCHES)
def branch(request) -> Branch:
    return BRANCHES[request.param]


@pytest.fixture(params=[None, 60], ids=["default tiles", "tiny tiles"])
def tile_elements(request, monkeypatch) -> None:
    """Tests are small; with tiles of 60 scores and pieces of 3 keys they still meet every seam between them."""
    if request.param is not None:
        monkeypatch.setattr("nsa.ops.tiles.TILE_ELEMENTS", request.param)
        monkeypatch.setattr("nsa.ops.tiled_attention.PIECE", 3)
        monkeypatch.setattr("nsa.ops.tiled_attention.PIECE_SCORES", 1)


@pytest.mark.usefixtures("tile_elements")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_brute_force_in_every_layout(branch, layout):
    case = branch.case(LAYOUTS[layout])
    torch.testing.assert_close(branch.run(case), branch.expected(case), **EXACT)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_equals_the_brute_force_on_any_number_of_threads(branch, threads):
    """One row and one group, whose queries are then shared out."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        case = branch.case(LAYOUTS["suffix"], g=1)
        torch.testing.assert_close(branch.run(case), branch.expected(case), **EXACT)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("step", [-300.0, -70.0, -40.0, 40.0, 70.0, 300.0])
def test_scores_may_rise_or_fall_by_any_amount_from_block_to_block(branch, step, dtype):
    """exp() of such differences overflows, or is 0: the softmax does neither."""
    case = branch.case(LAYOUTS["suffix"], d=4)
    blocks = torch.arange(case.k.shape[1]) // (4 if branch.compressed else 8)
    q, k = torch.zeros_like(case.q), case.k.clone()
    q[..., 0] = 2.0  # so that the first number of a key is its score, scale 1/2
    k[..., 0] = (step * blocks)[:, None]
    case = replace(case, q=q, k=k)
    case = case.to(dtype)
    exact = case.to(torch.float64)
    largest_score = abs(step) * int(blocks[-1]) + math.log(len(blocks))
    for got, plain, truth in zip(branch.run(case), branch.plain(case), branch.expected(exact), strict=True):
        assert_close_to_fp64(got, plain, truth, largest_score=largest_score)


@pytest.mark.parametrize("sharpness", [4.0, 16.0, 64.0])
def test_sharp_rows_are_as_exact_as_plain_pytorch(branch, sharpness):
    """A trained model's scores lie tens above that of the key that a tile takes for typical."""
    case = branch.case(LAYOUTS["suffix"], d=16)
    case = replace(case, q=sharpness * case.q).to(torch.float32)
    exact = branch.expected(case.to(torch.float64))
    for got, plain, truth in zip(branch.run(case), branch.plain(case), exact, strict=True):
        assert_close_to_fp64(got, plain, truth)


@pytest.mark.parametrize("family", INPUT_FAMILIES)
def test_equals_the_brute_force_on_every_input_family(branch, family):
    case = branch.case(LAYOUTS["suffix"], family=family)
    torch.testing.assert_close(branch.run(case), branch.expected(case), **EXACT)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 6, 8, 16])
@pytest.mark.parametrize("g", [1, 2])
def test_equals_the_brute_force_for_every_group_size(branch, group, g):
    case = branch.case(LAYOUTS["packed suffixes"], h=group * g, g=g, d=6, e=2)
    torch.testing.assert_close(branch.run(case), branch.expected(case), **EXACT)


def test_the_scale_multiplies_the_scores(branch):
    case = branch.case(LAYOUTS["suffix"])
    torch.testing.assert_close(branch.run(case, scale=0.3), branch.expected(case, scale=0.3), **EXACT)


@pytest.mark.usefixtures("tile_elements")
@pytest.mark.parametrize("layout", ["whole", "packed suffixes", "left padded"])
def test_gradients_are_those_of_the_brute_force(branch, layout):
    case = branch.case(LAYOUTS[layout])
    leaves = [x.requires_grad_() for x in case.tensors]
    out, lse = branch.run(case)
    expected_out, expected_lse = branch.expected(case)
    # Rows without keys have lse -inf; they take no part in a loss.
    seen = expected_lse.isfinite()
    weight_out, weight_lse = torch.randn_like(out), torch.randn_like(lse)[seen]
    actual = torch.autograd.grad((out * weight_out).sum() + (lse[seen] * weight_lse).sum(), leaves)
    expected = torch.autograd.grad((expected_out * weight_out).sum() + (expected_lse[seen] * weight_lse).sum(), leaves)
    torch.testing.assert_close(actual, expected, **EXACT)


@pytest.mark.parametrize(("h", "g"), [(1, 1), (4, 2), (3, 1)])
def test_gradcheck(branch, h, g):
    layout = Layout(t=4, s=12, cu_seqlens_q=(0, 3, 4), cu_seqlens_k=(0, 9, 12))
    case = branch.case(layout, h=h, g=g, d=2, e=1)
    seen = branch.run(case)[1].isfinite()  # finite differences of -inf are not numbers

    def differentiable(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = branch.run(case, *tensors)
        return out, lse[seen]

    assert torch.autograd.gradcheck(differentiable, [x.requires_grad_() for x in case.tensors])


def test_queries_without_keys_give_zero_out_minus_infinite_lse_and_zero_gradient(branch):
    case = branch.case(Layout(b=2, t=4, s=9, seqlens_k=(2, 0)))
    leaves = [x.requires_grad_() for x in case.tensors]
    out, lse = branch.run(case)
    empty = branch.expected(case)[1] == -torch.inf
    assert empty[0, :2].all()
    assert empty[1].all()
    assert (out[empty] == 0).all()
    assert (lse[empty] == -torch.inf).all()
    dq, dk, dv = torch.autograd.grad(out.square().sum() + out.sum(), leaves)
    assert (dq[empty] == 0).all()
    assert all((gradient[1] == 0).all() and gradient.isfinite().all() for gradient in (dq, dk, dv))


@pytest.mark.parametrize(("b", "t"), [(0, 4), (2, 0)])
def test_an_empty_batch_or_no_queries_give_an_empty_result(branch, b, t):
    case = branch.case(Layout(b=1, t=9, s=9))
    q, k, v = (x.expand(b, *x.shape[1:]) for x in case.tensors)
    from_case = type(case)(
        Layout(b=b, t=t, s=9), case.config, q[:, :t], k, v, case.block_indices[:, :t].expand(b, -1, -1, -1)
    )
    out, lse = branch.run(from_case)
    assert list(out.shape) == [b, t, 4, 5]
    assert list(lse.shape) == [b, t, 4]


@pytest.mark.usefixtures("tile_elements")
def test_the_future_changes_nothing(branch):
    layout = LAYOUTS["whole"]
    case = branch.case(layout)
    now = 29
    # The keys after position 29, and the compressed blocks that hold a token after it.
    first = case.config.num_compressed_blocks(now + 1) if branch.compressed else now + 1
    k, v = case.k.clone(), case.v.clone()
    k[:, first:] = 100 * torch.randn_like(k[:, first:])
    v[:, first:] = 100 * torch.randn_like(v[:, first:])
    changed, unchanged = branch.run(case, case.q, k, v), branch.run(case)
    for after, before in zip(changed, unchanged, strict=True):
        assert torch.equal(after[:, : now + 1], before[:, : now + 1])
        assert not torch.equal(after[:, now + 1 :], before[:, now + 1 :])


def test_packed_sequences_equal_separate_ones(branch):
    layout = LAYOUTS["packed suffixes"]
    case = branch.case(layout)
    out, lse = branch.run(case)
    for member in layout.members(case.config):
        take = member.blocks if branch.compressed else member.keys
        num_queries = member.query_range.stop - member.query_range.start
        alone = type(case)(
            Layout(t=num_queries, s=member.length),
            case.config,
            member.queries(case.q)[None],
            take(case.k)[None],
            take(case.v)[None],
            member.queries(case.block_indices)[None],
        )
        torch.testing.assert_close(branch.run(alone), (member.queries(out)[None], member.queries(lse)[None]), **EXACT)


@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_nan_reaches_every_query_that_sees_it_and_no_other_sequence(branch, which):
    case = branch.case(LAYOUTS["packed"])
    spoiled = {name: x.clone() for name, x in zip("qkv", case.tensors, strict=True)}
    first = case.layout.members(case.config)[0]
    take = first.queries if which == "q" else first.blocks if branch.compressed else first.keys
    take(spoiled[which])[0] = torch.nan
    out, _ = branch.run(case, *spoiled.values())
    clean, _ = branch.run(case)
    reached = branch.expected(case, *spoiled.values())[0].isnan()
    assert which == "q" or reached.any()
    assert out[reached].isnan().all()
    assert torch.equal(out[:, first.query_range.stop :], clean[:, first.query_range.stop :])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("family", ["random", "peaked", "near_uniform"])
def test_low_precision_stays_within_twice_plain_pytorchs_error(branch, dtype, family):
    case = branch.case(Layout(t=24, s=64), family=family, h=3, g=1, d=12, e=16).to(dtype)
    exact = case.to(torch.float64)
    results = []
    for run, judged in ((branch.run, case), (branch.plain, case), (branch.expected, exact)):
        leaves = [x.detach().requires_grad_() for x in judged.tensors]
        out, lse = run(judged, *leaves)
        gradients = torch.autograd.grad((out * torch.linspace(-1, 1, 16, dtype=out.dtype)).sum(), leaves)
        results.append({"out": out, "lse": lse, **dict(zip(("dq", "dk", "dv"), gradients, strict=True))})
    actual, plain, truth = results
    assert actual["lse"].dtype == torch.float32
    # The exponential's argument is a score less the log-sum-exp, which is at most log(64) above the scores.
    largest_score = float(exact.q.norm(dim=-1).max() * exact.k.norm(dim=-1).max()) * 12**-0.5
    largest_score += math.log(64)
    for name in truth:
        assert name == "lse" or actual[name].dtype == dtype
        assert_close_to_fp64(
            actual[name], plain[name].to(actual[name].dtype), truth[name], name, largest_score=largest_score
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_values_with_much_in_common_are_the_exact_ones_rounded(branch, dtype):
    """d_out * out is then far larger than what is left of it: out must not be rounded before."""
    case = branch.case(Layout(t=24, s=64), h=3, g=1, d=12, e=16)
    q, k, v = case.tensors
    inputs = [x.to(dtype) for x in (q, k, v * 0.1 + 8)]
    results = []
    for run, wanted in ((branch.run, dtype), (branch.expected, torch.float64)):
        leaves = [x.to(wanted).requires_grad_() for x in inputs]
        out, _ = run(case.to(wanted), *leaves)
        results.append(torch.autograd.grad((out * torch.linspace(-1, 1, 16, dtype=dtype).to(wanted)).sum(), leaves))
    for name, actual, truth in zip(("dq", "dk", "dv"), *results, strict=True):
        assert_close_to_fp64(actual, truth.to(dtype), truth, name)


EDGE_LENGTHS = [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 507, 511, 512, 513]


@pytest.mark.parametrize("length", EDGE_LENGTHS)
def test_edge_lengths_with_the_papers_sizes(branch, length):
    case = branch.case(Layout(t=length, s=length), NSAConfig(), h=1, g=1, d=4, e=4)
    torch.testing.assert_close(branch.run(case), branch.expected(case), **EXACT)


@given(
    branch=st.sampled_from(sorted(BRANCHES)),
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=4),
    group=st.integers(1, 5),
    g=st.integers(1, 3),
    strides=st.integers(1, 3),
    more_strides=st.integers(0, 3),
    stride=st.integers(1, 4),
    free_blocks=st.integers(0, 3),
    local_blocks=st.integers(1, 3),
    window_size=st.integers(1, 50),
    seed=st.integers(0, 9),
)
def test_equals_the_brute_force_for_any_shapes_and_lengths(
    branch, lengths, group, g, strides, more_strides, stride, free_blocks, local_blocks, window_size, seed
):
    config = NSAConfig(
        compress_block_size=strides * stride,
        compress_stride=stride,
        select_block_size=(strides + more_strides) * stride,
        num_selected_blocks=1 + local_blocks + free_blocks,
        num_local_blocks=local_blocks,
        window_size=window_size,
    )
    cu_q, cu_k = [0], [0]
    for some, more in lengths:
        cu_q.append(cu_q[-1] + min(some, more))
        cu_k.append(cu_k[-1] + max(some, more))
    layout = Layout(t=cu_q[-1], s=cu_k[-1], cu_seqlens_q=tuple(cu_q), cu_seqlens_k=tuple(cu_k))
    case = BRANCHES[branch].case(layout, config, h=group * g, g=g, d=3, e=2, seed=seed)
    torch.testing.assert_close(BRANCHES[branch].run(case), BRANCHES[branch].expected(case), **EXACT)


def test_equal_inputs_give_equal_bits(branch):
    case = branch.case(LAYOUTS["packed"]).to(torch.float32)
    leaves = [x.requires_grad_() for x in case.tensors]
    first, second = (
        (out, lse, *torch.autograd.grad(out.sum(), leaves)) for out, lse in (branch.run(case), branch.run(case))
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_small_configuration_leaves_blocks_out():
    # The tests above would prove little if every block were selected.
    assert SMALL.num_selection_blocks(45) > SMALL.num_selected_blocks
