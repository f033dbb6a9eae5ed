"""InfLLM-V2's function: choice and attention against the fp64 brute force, gradients, what is dense, every split."""

import pytest
import torch
from layouts import LAYOUTS, Layout
from torch._subclasses.fake_tensor import FakeTensorMode

from nsa.config import InfLLMv2Config
from nsa.methods.infllm_v2 import infllm_v2_attention
from nsa.ops.compress import compress, phi_mean
from nsa.ops.pooled_selection import pooled_scores, select_by_pooled_keys
from nsa.testing import INPUT_FAMILIES, InputShape, assert_close_to_fp64, per_sequence
from nsa.testing import brute_force as paper
from nsa.testing import brute_force_infllm_v2 as truth

EXACT = {"rtol": 0.0, "atol": 1e-10}
# A query lists 4 blocks of 4: the first, its own and the one before, and one more.
SMALL = InfLLMv2Config(kernel_size=4, kernel_stride=2, init_blocks=1, block_size=4, window_size=3, topk=3, dense_len=0)
CONFIGS = {
    "small": SMALL,
    "coarse lse": InfLLMv2Config.from_dict({**SMALL.to_dict(), "coarse_lse": True}),
    "dense_len": InfLLMv2Config.from_dict({**SMALL.to_dict(), "dense_len": 23}),
    "pooled blocks": InfLLMv2Config(
        kernel_size=2, kernel_stride=2, init_blocks=2, block_size=6, window_size=1, topk=3, dense_len=0
    ),
}


def inputs(layout: Layout, *, family="random", h=4, g=2, d=3, e=5, seed=0):
    shape = InputShape(b=layout.b, t=layout.t, s=layout.s, h=h, g=g, d=d, e=e)
    return INPUT_FAMILIES[family](torch.Generator().manual_seed(seed), shape)


def expected(layout: Layout, config: InfLLMv2Config, q, k, v, scale=None):
    def one(member):
        return (truth.infllm_v2_attention(member.queries(q), member.keys(k), member.keys(v), config, scale),)

    return per_sequence(layout.members(config.blocks), one)[0]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_brute_force_in_every_layout(monkeypatch, layout, config):
    monkeypatch.setattr("nsa.ops.tiles.TILE_ELEMENTS", 600)
    layout, config = LAYOUTS[layout], CONFIGS[config]
    q, k, v = inputs(layout)
    out = infllm_v2_attention(q, k, v, config, **layout.lengths())
    torch.testing.assert_close(out, expected(layout, config, q, k, v), **EXACT)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_and_lists_equal_the_brute_force(layout, config):
    layout, config = LAYOUTS[layout], CONFIGS[config]
    q, k, _ = inputs(layout)
    sequences, width = layout.sequences(), config.list_width(layout.s)
    k_pool = compress(k, phi_mean, config.blocks, sequences=sequences)
    scores = pooled_scores(q, k_pool, config, num_keys=layout.s, sequences=sequences)
    lists = select_by_pooled_keys(q, k_pool, config, num_keys=layout.s, sequences=sequences)

    def one(member):
        found = truth.block_scores(member.queries(q), member.keys(k), config)
        lists = truth.select_blocks(member.queries(q), member.keys(k), config, width)
        return torch.nn.functional.pad(found, (0, scores.shape[-1] - found.shape[-1])), lists

    true_scores, true_lists = per_sequence(layout.members(config.blocks), one)
    torch.testing.assert_close(scores, true_scores, **EXACT)
    assert torch.equal(lists, true_lists)


@pytest.mark.parametrize("family", INPUT_FAMILIES)
@pytest.mark.parametrize("group", [1, 3])
def test_equals_the_brute_force_on_every_input_family_and_group(family, group):
    layout = Layout(t=40, s=40)
    q, k, v = inputs(layout, family=family, h=group, g=1)
    torch.testing.assert_close(
        infllm_v2_attention(q, k, v, SMALL, scale=0.7), expected(layout, SMALL, q, k, v, 0.7), **EXACT
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_lower_precision_the_error_is_plain_pytorchs(dtype):
    layout = Layout(t=45, s=45)
    q, k, v = (x.to(dtype) for x in inputs(layout, d=8, e=8))
    lists = select_by_pooled_keys(q, compress(k, phi_mean, SMALL.blocks), SMALL, num_keys=45)
    exact = paper.selected_attention(*(x[0].double() for x in (q, k, v)), lists[0], SMALL.blocks)[0][None]
    seen = torch.zeros(45, 2, 45, dtype=torch.bool)
    for row, group, slot in (lists[0] >= 0).nonzero().tolist():
        block = int(lists[0, row, group, slot]) * SMALL.block_size
        seen[row, group, block : block + SMALL.block_size] = True
    mask = (seen & torch.ones(45, 45, dtype=torch.bool).tril()[:, None]).transpose(0, 1).repeat_interleave(2, 0)
    heads = (q.transpose(1, 2), *(x.transpose(1, 2).repeat_interleave(2, 1) for x in (k, v)))
    weights = (heads[0] @ heads[1].transpose(-1, -2) * 8**-0.5).masked_fill(~mask, -torch.inf).softmax(-1)
    plain = (weights @ heads[2]).transpose(1, 2)
    assert_close_to_fp64(infllm_v2_attention(q, k, v, SMALL), plain, exact)


@pytest.mark.parametrize("layout", ["suffix", "packed", "left padded"])
def test_gradients_are_those_of_the_brute_force(layout):
    layout = LAYOUTS[layout]
    config = CONFIGS["coarse lse"]
    tensors = [x.requires_grad_() for x in inputs(layout, h=2, g=1)]
    d_out = torch.randn(layout.b, layout.t, 2, 5, dtype=torch.float64)
    found = torch.autograd.grad(infllm_v2_attention(*tensors, config, **layout.lengths()), tensors, d_out)
    true = torch.autograd.grad(expected(layout, config, *tensors), tensors, d_out)
    for one, other in zip(found, true, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.parametrize("config", ["small", "dense_len"])
def test_gradcheck(config):
    tensors = [x.requires_grad_() for x in inputs(Layout(t=3, s=24), h=2, g=1, d=2, e=2)]
    assert torch.autograd.gradcheck(lambda *x: infllm_v2_attention(*x, CONFIGS[config]), tensors)


def test_the_choice_has_no_gradient():
    layout = Layout(t=40, s=40)
    q, k, v = inputs(layout)
    q.requires_grad_()
    k_pool = compress(k, phi_mean, SMALL.blocks).requires_grad_()
    infllm_v2_attention(q, k, v, SMALL, k_pool=k_pool).sum().backward()
    assert k_pool.grad is None


@pytest.mark.parametrize(
    ("length", "changes"), [(16, {}), (45, {"dense_len": 45}), (45, {"topk": 12}), (45, {"window_size": 45})]
)
def test_is_dense_attention_where_everything_fits_or_up_to_dense_len(length, changes):
    config = InfLLMv2Config.from_dict({**SMALL.to_dict(), **changes})
    q, k, v = inputs(Layout(b=2, t=length, s=length))
    out = infllm_v2_attention(q, k, v, config)
    for row in range(2):
        torch.testing.assert_close(out[row], paper.dense_attention(q[row], k[row], v[row])[0], **EXACT)


def test_the_queries_up_to_dense_len_are_dense_in_a_longer_sequence_too():
    config = CONFIGS["dense_len"]
    q, k, v = inputs(Layout(t=45, s=45))
    out = infllm_v2_attention(q, k, v, config)[0]
    dense = paper.dense_attention(q[0], k[0], v[0])[0]
    torch.testing.assert_close(out[:23], dense[:23], **EXACT)
    assert (out[23:] - dense[23:]).abs().amax((1, 2)).gt(1e-3).any()


@pytest.mark.parametrize("config", CONFIGS)
def test_every_split_is_the_whole(config):
    config = CONFIGS[config]
    q, k, v = inputs(Layout(b=2, t=45, s=45))
    whole = infllm_v2_attention(q, k, v, config)
    for split in range(1, 45):
        parts = infllm_v2_attention(q[:, :split], k[:, :split], v[:, :split], config)
        rest = infllm_v2_attention(q[:, split:], k, v, config)
        torch.testing.assert_close(torch.cat([parts, rest], 1), whole, **EXACT)


def test_the_window_is_always_read():
    config = InfLLMv2Config(kernel_size=4, kernel_stride=2, block_size=4, window_size=11, topk=2, dense_len=0)
    q, k, _ = inputs(Layout(t=60, s=60))
    lists = select_by_pooled_keys(q, compress(k, phi_mean, config.blocks), config, num_keys=60)
    for position in range(60):
        wanted = {p // 4 for p in range(max(0, position - 10), position + 1)} | {0}
        for group in range(2):
            assert wanted <= set(lists[0, position, group].tolist())


def test_what_is_not_finite_stays_with_those_who_see_it():
    q, k, v = inputs(Layout(b=2, t=45, s=45))
    clean = infllm_v2_attention(q, k, v, SMALL)
    k[0, 30], v[0, 30] = torch.nan, torch.inf
    out = infllm_v2_attention(q, k, v, SMALL)
    torch.testing.assert_close(out[1], clean[1], **EXACT)
    torch.testing.assert_close(out[0, :30], clean[0, :30], **EXACT)
    assert out[0, 30:33].isnan().all()


def test_what_is_traced_becomes_one_operator_with_the_same_numbers_and_gradients(monkeypatch):
    tensors = [x.requires_grad_() for x in inputs(Layout(t=45, s=45))]
    plain = infllm_v2_attention(*tensors, SMALL)
    monkeypatch.setattr("nsa.methods.infllm_v2.is_traced", lambda x: True)
    traced = infllm_v2_attention(*tensors, SMALL)
    assert traced.grad_fn.name() != plain.grad_fn.name()
    assert torch.equal(traced, plain)
    d_out = torch.randn_like(plain)
    for one, other in zip(*(torch.autograd.grad(out, tensors, d_out) for out in (traced, plain)), strict=True):
        assert torch.equal(one, other)
    with FakeTensorMode():
        fake = torch.empty(1, 45, 2, 8)
        assert infllm_v2_attention(fake, fake[:, :, :1], fake[:, :, :1], SMALL).shape == (1, 45, 2, 8)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {}}, "config should be an InfLLMv2Config"),
        ({"q": torch.zeros(1, 9, 2, 4)}, r"t <= s, got t = 9, s = 8"),
        ({"k": torch.zeros(1, 8, 2, 3)}, r"k should have shape \[b=1, s, g, d=4\], got \[1, 8, 2, 3\]"),
        ({"v": torch.zeros(1, 7, 2, 4)}, r"v should have shape \[b=1, s=8, g=2, e\], got"),
        ({"k": torch.zeros(1, 8, 2, 4, dtype=torch.float64)}, "k should have q's dtype torch.float32"),
        ({"v": torch.zeros(1, 8, 2, 4, dtype=torch.int32)}, "v should be of float64, float32"),
        ({"scale": 0.0}, "scale should be a finite number above 0"),
        ({"seqlens_k": torch.tensor([4, 4])}, r"seqlens_k should have shape \[b=1\], got \[2\]"),
        ({"cu_seqlens_k": torch.tensor([0, 8])}, "cu_seqlens_k was given without cu_seqlens_q"),
        ({"q": torch.zeros(1, 4, 2, 4), "cu_seqlens_q": torch.tensor([0, 4])}, "cu_seqlens_k should be given"),
        ({"backend": "triton"}, "backend 'triton' cannot serve"),
    ],
)
def test_what_does_not_fit_is_one_line(changes, message):
    x = torch.zeros(1, 8, 2, 4)
    with pytest.raises(ValueError, match=message) as caught:
        infllm_v2_attention(**{"q": x, "k": x, "v": x, "config": SMALL, **changes})
    assert "\n" not in str(caught.value)
