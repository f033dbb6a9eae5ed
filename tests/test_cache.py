"""The growing cache: what it alone does; test_cache_layouts.py has what all layouts do."""

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


def test_append_answers_for_one_more_release():
    k = torch.randn(1, 12, 1, 1)
    old, new = NSACache(CONFIG), NSACache(CONFIG)
    with pytest.warns(DeprecationWarning, match="call update"):
        found = old.append(k, -k, k, -k, k, -k, mean_run)
    for name, x in vars(append(new, k[..., 0, 0])).items():
        assert x is None or torch.equal(getattr(found, name), x)
