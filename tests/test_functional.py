"""The whole function: against the brute force, under every split and layout, and in its limits."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from layouts import LAYOUTS, Layout
from torch import Tensor

from nsa.config import NSAConfig
from nsa.functional import native_sparse_attention
from nsa.ops.combine import combine
from nsa.ops.compress import compress, phi_linear, phi_mean, phi_mlp
from nsa.ops.compressed_attention import compressed_attention
from nsa.ops.selected_attention import selected_attention
from nsa.ops.selection import select_blocks
from nsa.ops.window_attention import window_attention
from nsa.testing import INPUT_FAMILIES, InputShape, per_sequence
from nsa.testing import brute_force as paper

EXACT = {"rtol": 0.0, "atol": 1e-10}
SMALL = NSAConfig(compress_block_size=4, compress_stride=2, select_block_size=8, num_selected_blocks=4, window_size=6)


def inputs(
    layout: Layout, *, family: str = "random", h: int = 4, g: int = 2, d: int = 3, e: int = 5, seed: int = 0
) -> list[Tensor]:
    """q, k, v, gates in float64."""
    generator = torch.Generator().manual_seed(seed)
    shape = InputShape(b=layout.b, t=layout.t, s=layout.s, h=h, g=g, d=d, e=e)
    gates = torch.rand(layout.b, layout.t, h, 3, generator=generator, dtype=torch.float64)
    return [*INPUT_FAMILIES[family](generator, shape), gates]


def branch_inputs(layout: Layout, config: NSAConfig = SMALL) -> dict[str, Tensor]:
    """Keys and values of the compressed and window branches that are not those of the selected one."""
    sizes = {"cmp": layout.num_compressed_blocks(config), "win": layout.s}
    return {
        f"{kind}_{branch}": torch.randn(layout.b, size, 2, dim, dtype=torch.float64)
        for branch, size in sizes.items()
        for kind, dim in (("k", 3), ("v", 5))
    }


def brute_force(
    layout: Layout, config: NSAConfig, q, k, v, gates, *, scale: float | None = None, **branches: Tensor
) -> Tensor:
    def one(member) -> tuple[Tensor]:
        own = {name: (member.blocks if name.endswith("cmp") else member.keys)(x) for name, x in branches.items()}
        return (
            paper.native_sparse_attention(
                member.queries(q), member.keys(k), member.keys(v), member.queries(gates), config, scale=scale, **own
            ),
        )

    return per_sequence(layout.members(config), one)[0]


# ---- against the brute force ----


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_brute_force_in_every_layout(layout):
    layout = LAYOUTS[layout]
    tensors = inputs(layout)
    actual = native_sparse_attention(*tensors, SMALL, **layout.lengths())
    torch.testing.assert_close(actual, brute_force(layout, SMALL, *tensors), **EXACT)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_brute_force_with_keys_of_its_own_for_every_branch(layout):
    layout = LAYOUTS[layout]
    tensors, branches = inputs(layout), branch_inputs(layout)
    actual = native_sparse_attention(*tensors, SMALL, **branches, **layout.lengths())
    torch.testing.assert_close(actual, brute_force(layout, SMALL, *tensors, **branches), **EXACT)


@pytest.mark.parametrize("branch", range(3))
def test_the_scale_multiplies_the_scores_of_every_branch(branch):
    q, k, v, gates = inputs(LAYOUTS["suffix"])
    gates = torch.zeros_like(gates)
    gates[..., branch] = 1
    actual = native_sparse_attention(q, k, v, gates, SMALL, scale=0.3)
    torch.testing.assert_close(actual, brute_force(LAYOUTS["suffix"], SMALL, q, k, v, gates, scale=0.3), **EXACT)


@pytest.mark.parametrize("family", ["random", "peaked", "correlated"])
@pytest.mark.parametrize("group", [1, 3, 4, 16])
def test_equals_the_brute_force_for_families_and_groups(family, group):
    # Near-ties may select other blocks than the brute force: tied inputs are compared by score, in the ops' tests.
    layout = LAYOUTS["packed suffixes"]
    tensors = inputs(layout, family=family, h=2 * group)
    actual = native_sparse_attention(*tensors, SMALL, **layout.lengths())
    torch.testing.assert_close(actual, brute_force(layout, SMALL, *tensors), **EXACT)


@pytest.mark.parametrize("length", [1, 17, 63, 65, 513, 1000, 4097])
def test_edge_lengths_with_the_papers_sizes(length):
    tensors = inputs(Layout(t=length, s=length), h=2, g=1)
    out = native_sparse_attention(*tensors)
    for position in {0, length // 3, length // 2, length - 1}:
        q, k, v, gates = (x[:, : position + 1] for x in tensors)
        last = brute_force(Layout(t=1, s=position + 1), NSAConfig(), q[:, -1:], k, v, gates[:, -1:])
        torch.testing.assert_close(out[:, position], last[:, 0], **EXACT)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("length", [1, 5, 6, 7, 31, 32, 33])
def test_equals_the_brute_force_while_a_branch_sees_all_of_the_past(length, group, shared):
    """Up to w = 6 and n l' = 32 tokens the branches are causal attention, and one where they share keys."""
    layout = Layout(b=2, t=length, s=length)
    tensors = [x.requires_grad_() for x in inputs(layout, h=2 * group, d=4, e=4)]
    own = {} if shared else {name: torch.randn(2, length, 2, 4, dtype=torch.float64) for name in ("k_win", "v_win")}
    actual = native_sparse_attention(*tensors, SMALL, scale=0.7, **own)
    expected = brute_force(layout, SMALL, *tensors, scale=0.7, **own)
    weights = torch.randn_like(actual)
    grads, expected_grads = (torch.autograd.grad((out * weights).sum(), tensors) for out in (actual, expected))
    torch.testing.assert_close((actual, *grads), (expected, *expected_grads), **EXACT)


@given(
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=3),
    group=st.integers(1, 4),
    strides=st.integers(1, 3),
    more_strides=st.integers(0, 2),
    stride=st.integers(1, 4),
    free_blocks=st.integers(0, 3),
    window_size=st.integers(1, 50),
    seed=st.integers(0, 9),
)
def test_equals_the_brute_force_for_any_sizes_and_lengths(
    lengths, group, strides, more_strides, stride, free_blocks, window_size, seed
):
    config = NSAConfig(
        compress_block_size=strides * stride,
        compress_stride=stride,
        select_block_size=(strides + more_strides) * stride,
        num_selected_blocks=3 + free_blocks,
        window_size=window_size,
    )
    t, s = max(some for some, _ in lengths), max(some + more for some, more in lengths)
    layout = Layout(b=len(lengths), t=t, s=s, seqlens_k=tuple(some + more for some, more in lengths))
    tensors = inputs(layout, h=2 * group, g=2, seed=seed)
    actual = native_sparse_attention(*tensors, config, **layout.lengths())
    torch.testing.assert_close(actual, brute_force(layout, config, *tensors), **EXACT)


# ---- gradients ----

WEIGHTS = {"mean": [], "linear": [(3, 12)], "mlp": [(4, 3), (5, 12), (5,), (3, 5), (3,)]}
OURS = {"mean": phi_mean, "linear": phi_linear, "mlp": phi_mlp}
PAPER = {"mean": paper.phi_mean, "linear": paper.phi_linear, "mlp": paper.phi_mlp}


def with_compression(compression: str, layout: Layout, weights: list[Tensor], *tensors: Tensor) -> Tensor:
    """Ours, with keys (before compression) and values of their own for every branch, packed or not."""
    q, k, v, gates, k_raw, v_raw, k_win, v_win = tensors
    k_cmp, v_cmp = (
        compress(x, lambda blocks: OURS[compression](blocks, *weights), SMALL, sequences=layout.sequences())
        for x in (k_raw, v_raw)
    )
    return native_sparse_attention(
        q, k, v, gates, SMALL, k_cmp=k_cmp, v_cmp=v_cmp, k_win=k_win, v_win=v_win, **layout.lengths()
    )


def true_with_compression(compression: str, layout: Layout, weights: list[Tensor], *tensors: Tensor) -> Tensor:
    q, k, v, gates, k_raw, v_raw, k_win, v_win = tensors

    def one(member) -> tuple[Tensor]:
        k_cmp, v_cmp = (
            paper.compress(member.keys(x), SMALL, lambda block: PAPER[compression](block, *weights))
            for x in (k_raw, v_raw)
        )
        return (
            paper.native_sparse_attention(
                *(member.queries(q), member.keys(k), member.keys(v), member.queries(gates), SMALL),
                k_cmp=k_cmp,
                v_cmp=v_cmp,
                k_win=member.keys(k_win),
                v_win=member.keys(v_win),
            ),
        )

    return per_sequence(layout.members(SMALL), one)[0]


def leaves_of(compression: str, layout: Layout, h: int, g: int) -> tuple[list[Tensor], list[Tensor]]:
    q, k, v, gates = inputs(layout, h=h, g=g, e=3)
    tensors = [q, k, v, gates, *(torch.randn_like(x) for x in (k, v, k, v))]
    weights = [torch.randn(shape, dtype=torch.float64) for shape in WEIGHTS[compression]]
    return [x.requires_grad_() for x in tensors], [x.requires_grad_() for x in weights]


@pytest.mark.parametrize("compression", OURS)
@pytest.mark.parametrize("layout", ["whole", "packed"])
@pytest.mark.parametrize(("h", "g"), [(2, 2), (6, 2)])
def test_gradients_of_everything_are_those_of_the_brute_force(compression, layout, h, g):
    layout = LAYOUTS[layout]
    tensors, weights = leaves_of(compression, layout, h, g)
    weight_out = torch.randn(layout.b, layout.t, h, 3, dtype=torch.float64)
    actual = torch.autograd.grad(
        with_compression(compression, layout, weights, *tensors), [*tensors, *weights], weight_out
    )
    expected = torch.autograd.grad(
        true_with_compression(compression, layout, weights, *tensors), [*tensors, *weights], weight_out
    )
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("compression", OURS)
@pytest.mark.parametrize(("h", "g"), [(1, 1), (3, 1)])
def test_gradcheck_of_everything(compression, h, g):
    layout = Layout(t=12, s=12, cu_seqlens_q=(0, 2, 12))
    tensors, weights = leaves_of(compression, layout, h, g)

    def differentiable(*leaves: Tensor) -> Tensor:
        return with_compression(compression, layout, list(leaves[8:]), *leaves[:8])

    # Along random directions; the ops' own tests check every element.
    assert torch.autograd.gradcheck(differentiable, (*tensors, *weights), fast_mode=True)


# ---- limits ----


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2).transpose(1, 2) for x in (k, v))
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=True).transpose(1, 2)


@pytest.mark.parametrize("branch", [1, 2], ids=["all blocks selected", "window over everything"])
def test_a_branch_that_sees_everything_is_dense_attention(branch):
    config = NSAConfig(
        compress_block_size=4, compress_stride=2, select_block_size=8, num_selected_blocks=6, window_size=45
    )
    q, k, v, gates = inputs(LAYOUTS["whole"])
    gates = torch.zeros_like(gates)
    gates[..., branch] = 1
    torch.testing.assert_close(native_sparse_attention(q, k, v, gates, config), dense(q, k, v), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_is_the_gated_sum_of_its_steps(layout, dtype):
    layout = LAYOUTS[layout]
    q, k, v, gates = (x.to(dtype) for x in inputs(layout))
    sequences = layout.sequences()
    k_cmp, v_cmp = (compress(x, phi_mean, SMALL, sequences=sequences) for x in (k, v))
    out_cmp, _ = compressed_attention(q, k_cmp, v_cmp, SMALL, num_keys=layout.s, sequences=sequences)
    block_indices = select_blocks(q, k_cmp, SMALL, num_keys=layout.s, sequences=sequences)
    out_slc, _ = selected_attention(q, k, v, block_indices, SMALL, sequences=sequences)
    out_win, _ = window_attention(q, k, v, SMALL.window_size, sequences=sequences)
    actual = native_sparse_attention(q, k, v, gates, SMALL, **layout.lengths())
    assert torch.equal(actual, combine(out_cmp, out_slc, out_win, gates))


def test_the_future_changes_nothing():
    q, k, v, gates = inputs(LAYOUTS["whole"])
    now = 29
    changed = [x.clone() for x in (q, k, v, gates)]
    for x in changed:
        x[:, now + 1 :] = 100 * torch.rand_like(x[:, now + 1 :])
    before = native_sparse_attention(q, k, v, gates, SMALL)
    after = native_sparse_attention(*changed, SMALL)
    assert torch.equal(before[:, : now + 1], after[:, : now + 1])
    assert not torch.equal(before[:, now + 1 :], after[:, now + 1 :])


@pytest.mark.parametrize("split", range(1, 45))
def test_every_split_into_a_prefix_and_the_rest_equals_the_whole(split):
    tensors = inputs(LAYOUTS["whole"])
    whole = native_sparse_attention(*tensors, SMALL)
    prefix = native_sparse_attention(*(x[:, :split] for x in tensors), SMALL)
    q, k, v, gates = tensors
    rest = native_sparse_attention(q[:, split:], k, v, gates[:, split:], SMALL)
    torch.testing.assert_close(torch.cat([prefix, rest], dim=1), whole, **EXACT)


def test_decoding_with_no_more_of_the_window_than_it_needs_equals_the_whole():
    q, k, v, gates = inputs(LAYOUTS["whole"])
    whole = native_sparse_attention(q, k, v, gates, SMALL)
    for position in range(45):
        keys = slice(0, position + 1)
        near = slice(max(0, position + 1 - SMALL.window_size), position + 1)
        now = slice(position, position + 1)
        out = native_sparse_attention(
            q[:, now], k[:, keys], v[:, keys], gates[:, now], SMALL, k_win=k[:, near], v_win=v[:, near]
        )
        torch.testing.assert_close(out, whole[:, now], **EXACT)


def test_packed_sequences_equal_separate_ones():
    layout = LAYOUTS["packed"]
    q, k, v, gates = inputs(layout)
    packed = native_sparse_attention(q, k, v, gates, SMALL, **layout.lengths())
    separate = [
        native_sparse_attention(*(member.queries(x)[None] for x in (q, k, v, gates)), SMALL)
        for member in layout.members(SMALL)
    ]
    torch.testing.assert_close(packed, torch.cat(separate, dim=1), **EXACT)


def test_left_padding_changes_nothing_and_gives_zero():
    q, k, v, gates = (x[:1] for x in inputs(LAYOUTS["whole"]))
    alone = native_sparse_attention(q, k, v, gates, SMALL)
    pad = 7
    garbage = torch.full((1, pad, 4, 3), torch.nan, dtype=torch.float64)
    padded = native_sparse_attention(
        torch.cat([garbage, q], dim=1),
        # What lies past a row's keys is never read.
        *(F.pad(x, (0, 0, 0, 0, 0, pad), value=torch.nan) for x in (k, v)),
        torch.cat([torch.ones_like(garbage), gates], dim=1),
        SMALL,
        seqlens_k=torch.tensor([45]),
    )
    assert (padded[:, :pad] == 0).all()
    torch.testing.assert_close(padded[:, pad:], alone, **EXACT)


def test_nan_reaches_every_query_that_sees_it():
    q, k, v, gates = inputs(LAYOUTS["whole"])
    v[:, 0] = torch.nan  # token 0 is in every query's selection
    assert native_sparse_attention(q, k, v, gates, SMALL).isnan().all()


def test_repetition_gives_equal_bits_and_deterministic_algorithms_are_enough():
    torch.use_deterministic_algorithms(True)
    try:
        leaves = [x.float().requires_grad_() for x in inputs(LAYOUTS["packed"])]
        results = []
        for _ in range(2):
            out = native_sparse_attention(*leaves, SMALL, **LAYOUTS["packed"].lengths())
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
