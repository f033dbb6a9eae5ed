"""The layer: one meaning for every split into calls, every padding, every packing."""

from itertools import pairwise

import pytest
import torch
from tiny_layer import CONFIG, in_chunks, layer

from nsa import NativeSparseAttention, NSACache, NSAConfig


def test_packed_sequences_give_what_each_gives_alone_whole_or_in_chunks():
    attention, x = layer(), torch.randn(1, 90, 24, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, 3, 3, 40, 47, 90])
    with torch.no_grad():
        packed = attention(x, cu_seqlens=cu_seqlens)
        for start, end in pairwise(cu_seqlens.tolist()):
            if end > start:
                alone = in_chunks(attention, x[:, start:end], [end - start - 1, 1], NSACache(CONFIG))
                torch.testing.assert_close(packed[:, start:end], alone, rtol=1e-10, atol=1e-10)


def test_gradients_of_padded_and_packed_batches_are_those_of_the_rows_alone():
    attention = layer()
    x = torch.randn(1, 50, 24, dtype=torch.float64)
    target = torch.randn(1, 50, 24, dtype=torch.float64)

    def gradients(loss):
        attention.zero_grad()
        loss.backward()
        return [parameter.grad.clone() for parameter in attention.parameters()]

    alone = gradients((attention(x[:, :20]) * target[:, :20]).sum() + (attention(x[:, 20:]) * target[:, 20:]).sum())
    packed = gradients((attention(x, cu_seqlens=torch.tensor([0, 20, 50])) * target).sum())
    rows = torch.zeros(2, 30, 24, dtype=torch.float64)
    rows[0, 10:], rows[1] = x[0, :20], x[0, 20:]
    targets = torch.zeros_like(rows)
    targets[0, 10:], targets[1] = target[0, :20], target[0, 20:]
    mask = torch.ones(2, 30)
    mask[0, :10] = 0
    padded = gradients((attention(rows, attention_mask=mask) * targets).sum())
    for one, two, three in zip(alone, packed, padded, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(three, one, rtol=1e-9, atol=1e-9)


def test_the_layer_starts_near_mean_pooling_with_gates_at_one_half():
    torch.manual_seed(0)
    attention = NativeSparseAttention(24, 4, 2, config=CONFIG)
    blocks = torch.randn(5, 8, 6)
    torch.testing.assert_close(attention.compress_k(blocks), blocks.mean(-2))
    linear = NativeSparseAttention(24, 4, 2, config=NSAConfig.from_dict({**CONFIG.to_dict(), "compression": "linear"}))
    torch.testing.assert_close(linear.compress_v(blocks), blocks.mean(-2))
    assert (attention.g_proj(torch.randn(1, 3, 24)).sigmoid() == 0.5).all()


def test_forward_and_gradients_are_finite_in_bf16():
    torch.manual_seed(0)
    attention = NativeSparseAttention(64, 4, 2, config=CONFIG).bfloat16()
    x = (torch.randn(2, 100, 64) * 10).bfloat16().requires_grad_()
    attention(x).float().square().mean().backward()
    assert x.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in attention.parameters())


def test_every_parameter_gets_a_gradient():
    attention = layer()
    attention(torch.randn(1, 40, 24, dtype=torch.float64)).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in attention.parameters())


def test_nan_in_one_token_is_never_hidden_from_those_that_see_it():
    attention, x = layer(), torch.randn(1, 40, 24, dtype=torch.float64)
    x[0, 20] = torch.nan
    with torch.no_grad():
        out = attention(x)
    assert out[0, 20].isnan().all()
    assert out[0, 21:30].isnan().all()  # inside the window of the token


def test_parameters_and_cache_bytes_are_counted():
    attention = NativeSparseAttention(24, 4, 2, 6, 10, CONFIG)
    phi = sum(8 * d + (8 * d * 2 * d + 2 * d) + (2 * d * d + d) for d in (6, 10))
    projections = 24 * 4 * 6 + 3 * (24 * 2 * 6 + 24 * 2 * 10) + 4 * 10 * 24
    assert attention.num_parameters() == projections + phi + (24 * 12 + 12)
    assert attention.cache_bytes_per_token() == 2 * (6 + 10) * 4 * (1 + 1 / 4)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: NativeSparseAttention(24, 4, 3), "multiple of num_kv_heads, got 4 and 3"),
        (lambda: NativeSparseAttention(25, 4, 2), "got 25 and 4"),
        (lambda: NativeSparseAttention(20, 4, 2, 5), "head_dim should be even, got 5"),
        (lambda: layer()(torch.zeros(1, 3, 23, dtype=torch.float64)), "hidden=24\\], got \\[1, 3, 23\\]"),
        (
            lambda: layer()(torch.zeros(2, 3, 24, dtype=torch.float64), attention_mask=torch.ones(2, 2)),
            "\\[b=2, at least t=3\\], got \\[2, 2\\]",
        ),
        (
            lambda: layer()(
                torch.zeros(1, 3, 24, dtype=torch.float64), cache=NSACache(CONFIG), cu_seqlens=torch.tensor([0, 3])
            ),
            "cu_seqlens does not go with a cache",
        ),
    ],
)
def test_a_wrong_shape_is_one_clear_line(build, message):
    with pytest.raises(ValueError, match=message) as error:
        build()
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("x", "arguments", "message"),
    [
        (torch.zeros(3, 24), {}, r"x should have shape \[b, t, hidden=24\], got \[3, 24\]"),
        (torch.zeros(1, 3, 24, dtype=torch.int64), {}, "x should be a tensor .* of floating point, got torch.int64"),
        ([[0.0] * 24], {}, "x should be a tensor .*, got list"),
        (torch.zeros(1, 3, 24), {"attention_mask": [[1, 1, 1]]}, "attention_mask should be a tensor .*, got list"),
        (torch.zeros(1, 3, 24), {"cu_seqlens": [0, 3]}, "cu_seqlens should be a 1-D int32 or int64 tensor, got list"),
        (torch.zeros(1, 3, 24), {"position_ids": [[0, 1, 2]]}, "position_ids should be a tensor .*, got list"),
    ],
)
def test_what_is_no_tensor_of_the_right_kind_is_named(x, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        NativeSparseAttention(24, 4, 2, config=CONFIG)(x, **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("without_shape_checks")
def test_a_configuration_that_is_a_dict_is_named():
    with pytest.raises(ValueError, match=r"config should be an NSAConfig \(NSAConfig.from_dict\), got dict"):
        NativeSparseAttention(24, 4, 2, config=CONFIG.to_dict())


@pytest.mark.parametrize("shape", [(0, 70, 32), (2, 0, 32), (1, 1, 32), (2, 3, 32), (3, 31, 32)])
def test_rows_shorter_than_a_block_have_no_loss_of_the_selector(shape):
    layer, x = NativeSparseAttention(32, 4, 2, 8), torch.randn(shape, requires_grad=True)
    layer.selector_weight = 1.0
    layer(x).sum().backward()
    with_loss, x.grad, layer.selector_weight = x.grad, None, 0.0
    layer(x).sum().backward()
    assert torch.equal(with_loss, x.grad)
