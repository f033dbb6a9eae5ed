"""The oracle of evaluation: blocks by the exact attention mass of their keys, against loops in fp64."""

import pytest
import torch
from layouts import LAYOUTS

from nsa.config import InfLLMv2Config, NSAConfig
from nsa.functional import native_sparse_attention
from nsa.methods.infllm_v2 import infllm_v2_attention
from nsa.methods.oracle import selection_by_mass
from nsa.testing import brute_force, brute_force_infllm_v2, per_sequence
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


@pytest.mark.parametrize("dense_len", [0, 23])
@pytest.mark.parametrize("layout", ["suffix", "packed", "left padded"])
def test_infllm_v2_reads_the_blocks_of_most_mass_in_every_layout(monkeypatch, layout, dense_len):
    monkeypatch.setattr("nsa.ops.tiles.TILE_ELEMENTS", 600)
    config, layout = (
        InfLLMv2Config(block_size=4, kernel_size=4, kernel_stride=2, window_size=3, topk=3, dense_len=dense_len),
        LAYOUTS[layout],
    )
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(layout.b, n, heads, 6).double() * 2 for n, heads in ((layout.t, 4), (layout.s, 2), (layout.s, 2))
    )

    def one(member):
        q_own, k_own, v_own = member.queries(q), member.keys(k), member.keys(v)
        positions = query_positions(len(q_own), len(k_own))

        def mass(row, position, group):
            found = torch.zeros(-(-len(k_own) // 4), dtype=torch.float64)
            for head in (2 * group, 2 * group + 1):
                p = torch.softmax(k_own[: position + 1, group] @ q_own[row, head] * 6**-0.5, dim=0)
                for token, share in enumerate(p):
                    found[token // 4] += share
            return found.tolist()

        def visible(row, position, group):
            blocks = brute_force_infllm_v2.listed(mass(row, position, group), position, config)
            return [key for key in range(position + 1) if key // 4 in blocks]

        return (brute_force.attention(q_own, k_own, v_own, positions, visible)[0],)

    expected = per_sequence(layout.members(config.blocks), one)[0]
    with selection_by_mass():
        found = infllm_v2_attention(q, k, v, config, **layout.lengths())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    usual = infllm_v2_attention(q, k, v, config, **layout.lengths())
    assert (usual - found).abs().max() > 1e-3
