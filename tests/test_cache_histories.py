"""Rows of one length by different steps: a cache reads each by its own history; who sits out takes no room."""

import pytest
import torch
from moved import moved

from nsa import NativeSparseAttention, NSACache, NSAConfig
from nsa.cache import PagedNSACache, StaticNSACache

CONFIG = NSAConfig(compress_block_size=8, compress_stride=4, select_block_size=8, num_selected_blocks=4, window_size=12)


def layer() -> NativeSparseAttention:
    torch.manual_seed(0)
    attention = NativeSparseAttention(16, 4, 2, config=CONFIG).double()
    return moved(attention, 0.3)


def fed(attention, cache, x: torch.Tensor, steps: list[tuple[int, ...]]) -> list[torch.Tensor]:
    """Feed row r of x its next steps[i][r] tokens, all rows at once with padding before; the outputs of each row."""
    done, outs = [0] * len(x), [[] for _ in x]
    for counts in steps:
        t = max(counts)
        columns = torch.zeros(len(x), t, x.shape[2], dtype=x.dtype)
        mask = torch.arange(t) >= t - torch.tensor(counts)[:, None]
        for row, count in enumerate(counts):
            columns[row, t - count :] = x[row, done[row] : done[row] + count]
            done[row] += count
        out = attention(columns, cache=cache, attention_mask=mask)
        for row, count in enumerate(counts):
            outs[row].append(out[row, t - count :])
    assert cache.lengths == done
    return [torch.cat(parts) for parts in outs]


@pytest.mark.parametrize("new", [
    lambda: NSACache(CONFIG, max_crop=0), lambda: NSACache(CONFIG, max_crop=5), lambda: NSACache(CONFIG),
    lambda: StaticNSACache(CONFIG, 96, max_crop=0), lambda: PagedNSACache(CONFIG, 12, page_size=16, max_crop=5),
], ids=["growing, 0", "growing, 5", "growing, 64", "static", "paged"])  # fmt: skip
@pytest.mark.parametrize("steps", [
    [(70, 40), (10, 40), (1, 1), (5, 5)],
    [(26, 25), (0, 1), (1, 1), (1, 1)],
    [(30, 1), (0, 29), (30, 30)],
    [(8, 7), (3, 4), (21, 20), (0, 1), (40, 40)],
], ids=str)  # fmt: skip
def test_rows_that_reach_one_length_by_different_steps_read_their_own_tokens(new, steps):
    attention, x = layer(), torch.randn(2, 100, 16, dtype=torch.float64)
    with torch.no_grad():
        for row, out in enumerate(fed(attention, new(), x, steps)):
            torch.testing.assert_close(out, attention(x[row : row + 1, : len(out)])[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("new", [
    lambda: StaticNSACache(CONFIG, 8), lambda: PagedNSACache(CONFIG, 2, page_size=16, max_length=8),
], ids=["static", "paged"])  # fmt: skip
def test_a_full_row_that_sits_steps_out_does_not_stop_its_batch(new):
    attention, x, cache = layer(), torch.randn(2, 8, 16, dtype=torch.float64), new()
    with torch.no_grad():
        _, out = fed(attention, cache, x, [(8, 3), (0, 1), (0, 2), (0, 1), (0, 1)])
        torch.testing.assert_close(out, attention(x[1:])[0], rtol=1e-10, atol=1e-10)
        with pytest.raises(ValueError, match="at most 8 tokens a row, got 9"):
            attention(x[:, :1], cache=cache, attention_mask=torch.tensor([[0], [1]]))
        assert cache.lengths == [8, 8]


def test_rows_that_sit_steps_out_leave_the_pages_to_the_others():
    """Row 0 takes a page for tokens that may come; row 1 gets it when there is no other, by a step or by a chunk."""
    for steps in ([(0, 1)] * 36, [(0, 1)] * 17 + [(0, 19)]):
        attention, x = layer(), torch.randn(2, 48, 16, dtype=torch.float64)
        cache = PagedNSACache(CONFIG, 4, page_size=16, max_new=1)
        with torch.no_grad():
            _, out = fed(attention, cache, x, [(12, 12), *steps])
            torch.testing.assert_close(out, attention(x[1:])[0], rtol=1e-10, atol=1e-10)
        assert cache.num_pages_used == 4


def test_the_number_of_rows_is_known_without_asking_for_their_lengths():
    attention, x = layer(), torch.randn(2, 5, 16, dtype=torch.float64)
    cache = StaticNSACache(CONFIG, 32)
    with torch.no_grad():
        attention(x, cache=cache)
        attention(x[:, :1], cache=cache, attention_mask=torch.tensor([[0], [1]]))
        cache.tensors.lengths.fill_(7)  # what the host would learn if it asked
        attention(x[:, :1], cache=cache, attention_mask=torch.tensor([[1], [1]]))
    assert cache.num_rows == 2
    assert cache.lengths == [8, 8]
