"""The cache: what it remembers, counts, takes back, and refuses."""

import pytest
import torch

from nsa import NSACache, NSAConfig
from nsa.cache import CacheViews
from nsa.streams import Branches

CONFIG = NSAConfig(compress_block_size=8, compress_stride=4, select_block_size=8, num_selected_blocks=4, window_size=6)


def mean_run(k, v, first):
    """phi = mean; the first block's index is added to the key, so that a wrong one shows."""
    k, v = (x.unfold(1, 8, 4).mean(-1) for x in (k, v))
    return k + torch.arange(first, first + k.shape[1]).view(1, -1, 1, 1), v


def append(cache, x, counts=None):
    """All branches hold the same tokens x [b, t], one head of width 1; values are negated."""
    k = x[:, :, None, None]
    return CacheViews.of(cache.update(Branches.of_tokens(k, -k, k, -k, k, -k), mean_run, counts=counts))


def reference(tokens):
    """Compressed keys of one row of tokens, by hand."""
    return [sum(tokens[i * 4 : i * 4 + 8]) / 8 + i for i in range(CONFIG.num_compressed_blocks(len(tokens)))]


@pytest.mark.parametrize("chunks", [[50], [1] * 50, [7, 1, 30, 12], [8, 42], [0, 3, 47]])
def test_views_hold_every_token_of_every_branch_whatever_the_chunks(chunks):
    tokens = torch.randn(2, 50, dtype=torch.float64)
    cache, done = NSACache(CONFIG, max_crop=3), 0
    for chunk in chunks:
        views = append(cache, tokens[:, done : done + chunk])
        done += chunk
        torch.testing.assert_close(views.k[..., 0, 0], tokens[:, :done], rtol=0, atol=0)
        torch.testing.assert_close(views.v[..., 0, 0], -tokens[:, :done], rtol=0, atol=0)
        near = views.k_win[..., 0, 0]
        assert near.shape[1] >= min(done, chunk + CONFIG.window_size - 1)
        torch.testing.assert_close(near, tokens[:, done - near.shape[1] : done], rtol=0, atol=0)
        for row in range(2):
            expected = torch.tensor(reference(tokens[row, :done].tolist()), dtype=torch.float64)
            torch.testing.assert_close(views.k_cmp[row, :, 0, 0], expected)


def test_rows_of_different_lengths_are_left_aligned_with_their_lengths():
    tokens = torch.randn(3, 40, dtype=torch.float64)
    kept: list[list[float]] = [[], [], []]
    cache = NSACache(CONFIG, max_crop=3)
    for start, stop, counts in [(0, 20, [20, 3, 0]), (20, 21, [1, 1, 1]), (21, 30, [0, 9, 4]), (30, 40, [10, 10, 10])]:
        views = append(cache, tokens[:, start:stop], counts)
        for row, count in enumerate(counts):
            kept[row] += tokens[row, stop - count : stop].tolist()
            assert views.k[row, : len(kept[row]), 0, 0].tolist() == kept[row]
            blocks = torch.tensor(reference(kept[row]), dtype=torch.float64)
            torch.testing.assert_close(views.k_cmp[row, : len(blocks), 0, 0], blocks)
            near = int(views.seqlens_win[row])
            assert near >= min(len(kept[row]), count + CONFIG.window_size - 1)
            assert views.k_win[row, :near, 0, 0].tolist() == kept[row][len(kept[row]) - near :]
        assert views.seqlens_k.tolist() == [len(row) for row in kept]


def test_crop_makes_the_tokens_as_if_they_had_never_come():
    tokens = torch.randn(1, 60, dtype=torch.float64)
    for length in range(1, 41):
        for crop in range(min(length, 9)):
            cache, fresh = NSACache(CONFIG, max_crop=8), NSACache(CONFIG, max_crop=8)
            append(cache, torch.cat([tokens[:, : length - crop], torch.full((1, crop), 99.0)], dim=1))
            cache.crop(crop)
            if length > crop:
                append(fresh, tokens[:, : length - crop])
            after, expected = append(cache, tokens[:, 40:]), append(fresh, tokens[:, 40:])
            for name in ("k", "v", "k_cmp", "v_cmp"):
                torch.testing.assert_close(getattr(after, name), getattr(expected, name))
            n = min(after.k_win.shape[1], expected.k_win.shape[1])
            torch.testing.assert_close(after.k_win[:, -n:], expected.k_win[:, -n:])
            assert n >= min(length - crop + 20, 20 + CONFIG.window_size - 1)


def test_crop_refuses_what_is_no_longer_remembered_and_leaves_the_cache_as_it_was():
    cache = NSACache(CONFIG, max_crop=4)
    for _ in range(50):
        append(cache, torch.randn(1, 1))
    with pytest.raises(ValueError, match=r"max_crop=4 .* got 40"):
        cache.crop(40)
    with pytest.raises(ValueError, match=r"cannot crop 51 tokens from rows of \[50\]"):
        cache.crop(51)
    assert cache.lengths == [50]
    cache.crop(4)
    assert cache.lengths == [46]


def test_reorder_repeats_and_drops_rows():
    tokens = torch.randn(3, 20)
    cache = NSACache(CONFIG)
    append(cache, tokens, [20, 10, 15])
    cache.reorder(torch.tensor([2, 0, 0, 1]))
    assert cache.lengths == [15, 20, 20, 10]
    views = append(cache, torch.zeros(4, 1))
    assert views.k[0, :15, 0, 0].tolist() == tokens[2, 5:].tolist()
    assert views.k[2, :20, 0, 0].tolist() == tokens[0].tolist()


def test_bytes_are_those_of_the_keys_and_values_remembered():
    config = NSAConfig()
    cache = NSACache(config, max_crop=0)
    k, v = torch.zeros(1, 4096, 2, 16), torch.zeros(1, 4096, 2, 8)
    for _ in range(2):
        mean = lambda k, v, first: (k.unfold(1, 32, 16).mean(-1), v.unfold(1, 32, 16).mean(-1))  # noqa: E731
        cache.update(Branches.of_tokens(k, v, k, v, k, v), mean)
    pairs = 8192 + config.num_compressed_blocks(8192) + 511 + 31
    assert cache.num_bytes() == pairs * 2 * (16 + 8) * 4


def test_gradients_flow_through_an_append_to_an_empty_or_a_full_cache():
    old, new = torch.randn(1, 10), torch.randn(1, 3, requires_grad=True)
    cache = NSACache(CONFIG)
    append(cache, old)
    append(cache, new).k.sum().backward()
    assert new.grad.tolist() == [[1.0, 1.0, 1.0]]


def test_another_number_of_rows_is_an_error():
    cache = NSACache(CONFIG)
    append(cache, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="expected 2 rows as before, got 3"):
        append(cache, torch.zeros(3, 1))


def test_append_answers_for_one_more_release():
    k = torch.randn(1, 12, 1, 1)
    old, new = NSACache(CONFIG), NSACache(CONFIG)
    with pytest.warns(DeprecationWarning, match="call update"):
        found = old.append(k, -k, k, -k, k, -k, mean_run)
    for name, x in vars(append(new, k[..., 0, 0])).items():
        assert x is None or torch.equal(getattr(found, name), x)
