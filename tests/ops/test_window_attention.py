"""What is special to the sliding window: exactly w keys, and dense attention once it covers everything."""

import pytest
import torch

from nsa.ops.window_attention import window_attention


def inputs(t: int, s: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.randn(1, t, 2, 4, dtype=torch.float64),
        torch.randn(1, s, 1, 4, dtype=torch.float64),
        torch.randn(1, s, 1, 3, dtype=torch.float64),
    )


@pytest.mark.parametrize("t", [30, 7, 1])
@pytest.mark.parametrize("window_size", [1, 2, 29, 30, 31])
def test_a_query_sees_exactly_the_last_w_keys(t, window_size):
    # With values that name their positions and equal scores, the output is the mean of the visible positions.
    q, k = torch.zeros(1, t, 1, 1, dtype=torch.float64), torch.zeros(1, 30, 1, 1, dtype=torch.float64)
    positions = torch.arange(30.0, dtype=torch.float64)
    out, lse = window_attention(q, k, positions.view(1, 30, 1, 1), window_size)
    for column, position in enumerate(range(30 - t, 30)):
        seen = positions[max(0, position - window_size + 1) : position + 1]
        assert out[0, column, 0, 0].item() == pytest.approx(seen.mean().item(), rel=1e-14)
        assert lse[0, column, 0].exp().item() == pytest.approx(len(seen), rel=1e-14)


@pytest.mark.parametrize(("t", "s"), [(300, 300), (50, 300), (1, 300)])
@pytest.mark.parametrize("window_size", [300, 301, 10_000])
def test_a_window_over_everything_is_dense_attention(t, s, window_size):
    q, k, v = inputs(t, s)
    mask = torch.ones(t, s, dtype=torch.bool).tril(s - t)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask, enable_gqa=True
    )
    out, _ = window_attention(q, k, v, window_size)
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("window_size", [0, -1])
def test_a_window_without_keys_is_one_clear_line(window_size):
    with pytest.raises(ValueError, match=rf"^window_attention: window_size .* at least 1, got {window_size}$"):
        window_attention(*inputs(4, 4), window_size)


@pytest.mark.usefixtures("without_shape_checks")
def test_keys_and_values_of_different_lengths_are_one_clear_line():
    q, k, _ = inputs(4, 4)
    _, _, v = inputs(4, 5)
    message = r"^window_attention: v should have shape \[b=1, s=4, g=1, e\], got \[1, 5, 1, 3\]$"
    with pytest.raises(ValueError, match=message):
        window_attention(q, k, v, 2)


@pytest.mark.usefixtures("without_shape_checks")
def test_query_heads_that_kv_heads_do_not_divide_are_one_clear_line():
    q = torch.zeros(1, 4, 3, 4)
    with pytest.raises(ValueError, match=r"^window_attention: .*multiple of the KV heads, got 3 and 2$"):
        window_attention(q, torch.zeros(1, 4, 2, 4), torch.zeros(1, 4, 2, 3), 2)
