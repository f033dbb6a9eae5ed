"""The oracle of evaluation: blocks by the exact attention mass of their keys, against loops in fp64."""

import pytest
import torch

from nsa.config import NSAConfig
from nsa.functional import native_sparse_attention
from nsa.methods.nsa import selection_by_mass
from nsa.testing import brute_force
from nsa.testing.brute_force_selection import query_positions, select

CONFIG = NSAConfig(
    compress_block_size=8, compress_stride=4, select_block_size=16, num_selected_blocks=4, window_size=24
)


@pytest.mark.parametrize("scores", [2**26, 7 * 4 * 150])  # of all queries at once, of seven
def test_the_selected_branch_reads_the_blocks_of_most_mass(monkeypatch, scores):
    monkeypatch.setattr("nsa.methods.nsa.SCORES", scores)
    torch.manual_seed(0)
    t, s, h, g, d = 90, 150, 4, 2, 8
    q, gates = torch.randn(1, t, h, d).double() * 2, torch.rand(1, t, h, 3).double()
    k, v = (torch.randn(1, s, g, d).double() for _ in "kv")
    picks = []
    for row, position in enumerate(query_positions(t, s)):
        for group in range(g):
            mass = torch.zeros(-(-s // 16), dtype=torch.float64)
            for head in range(group * h // g, (group + 1) * h // g):
                p = torch.softmax(k[0, : position + 1, group] @ q[0, row, head] * d**-0.5, dim=0)
                for token, share in enumerate(p):
                    mass[token // 16] += share
            picks.append(select(mass.tolist(), position, CONFIG))
    indices = torch.tensor(picks, dtype=torch.int32).view(t, g, -1)
    cmp = [brute_force.compress(x[0], CONFIG, brute_force.phi_mean) for x in (k, v)]
    branches = (
        brute_force.compressed_attention(q[0], *cmp, s, CONFIG),
        brute_force.selected_attention(q[0], k[0], v[0], indices, CONFIG),
        brute_force.window_attention(q[0], k[0], v[0], CONFIG.window_size),
    )
    expected = brute_force.combine(*(out for out, _ in branches), gates[0])
    with selection_by_mass():
        found = native_sparse_attention(q, k, v, gates, CONFIG)
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-10)
    usual = native_sparse_attention(q, k, v, gates, CONFIG)
    assert (usual - found).abs().max() > 1e-3


@pytest.mark.parametrize(("b", "t", "s"), [(0, 90, 90), (1, 0, 0), (1, 0, 90)])
def test_no_queries_select_nothing(b, t, s):
    q, k, gates = torch.randn(b, t, 4, 8), torch.randn(b, s, 2, 8), torch.rand(b, t, 4, 3)
    with selection_by_mass():
        assert native_sparse_attention(q, k, k, gates, CONFIG).shape == (b, t, 4, 8)
