"""Pages of one key are scored by that key: bounds, and mean and variance, choose as pools of one key do."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from nsa.config import InfLLMv2Config
from nsa.ops.pooled_selection import select_by_pooled_keys

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
bench = importlib.import_module("pooled_choice")


@pytest.mark.parametrize("kind", ["bound", "var"])
@pytest.mark.parametrize("seen", [40, 37])
def test_pages_of_one_key_choose_as_the_keys_do(kind, seen):
    torch.manual_seed(0)
    q, k = torch.randn(1, 5, 4, 8, dtype=torch.float64), torch.randn(1, seen, 2, 8, dtype=torch.float64)
    config = InfLLMv2Config(kernel_size=1, kernel_stride=1, block_size=4, window_size=4, topk=3, dense_len=0)
    found = bench.by_pages(kind, q, k, config)
    assert torch.equal(found, select_by_pooled_keys(q, k, config, num_keys=seen))
    assert not torch.equal(found, bench.by_pages(kind, q.flip(1), k, config))


def test_a_page_is_bounded_by_the_largest_of_each_channel_whatever_key_has_it():
    k = torch.zeros(1, 32, 1, 2, dtype=torch.float64)
    k[0, 4, 0], k[0, 5, 0] = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 3.0])  # bounded by 6, each 3
    k[0, 8:10, 0] = 2.0  # 4
    q = torch.ones(1, 1, 1, 2, dtype=torch.float64)
    config = InfLLMv2Config(kernel_size=2, kernel_stride=2, block_size=4, window_size=4, topk=3, dense_len=0)
    forced, pools = {0, 6, 7}, k.unflatten(1, (16, 2)).mean(2)
    assert set(bench.by_pages("bound", q, k, config).flatten().tolist()) == forced | {1}
    assert set(select_by_pooled_keys(q, pools, config, num_keys=32).flatten().tolist()) == forced | {2}
