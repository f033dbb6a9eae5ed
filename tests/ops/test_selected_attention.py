"""What is special to selected attention: its indices, and that its tilings are one operation."""

import sys

import pytest
import torch
from branches import BRANCHES, SMALL, random_selection
from layouts import LAYOUTS, Layout

from nsa.ops.selected_attention import selected_attention

EXACT = {"rtol": 0.0, "atol": 1e-10}
MODULE = sys.modules["nsa.ops.selected_attention"]
TILINGS = ["by_query", "by_block", "masked"]


@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("t", [60, 9])
def test_all_blocks_selected_is_dense_attention(tiling, t):
    s, num_blocks = 60, SMALL.num_selection_blocks(60)
    q = torch.randn(2, t, 4, 3, dtype=torch.float64)
    k, v = torch.randn(2, s, 2, 3, dtype=torch.float64), torch.randn(2, s, 2, 5, dtype=torch.float64)
    # Every block, later ones too: the query's own position still bounds what it sees.
    block_indices = torch.arange(num_blocks, dtype=torch.int32).expand(2, t, 2, num_blocks)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=torch.ones(t, s).tril(s - t).bool(), enable_gqa=True
    )
    out, _ = selected_attention(q, k, v, block_indices, SMALL, tiling=tiling)
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("tiling", TILINGS)
def test_the_order_of_the_indices_and_where_the_empty_slots_are_change_nothing(tiling):
    case = BRANCHES["selected"].case(LAYOUTS["whole"])
    shuffled = case.block_indices[..., torch.randperm(SMALL.num_selected_blocks)].long()
    first, second = (
        selected_attention(*case.tensors, indices, SMALL, tiling=tiling) for indices in (case.block_indices, shuffled)
    )
    torch.testing.assert_close(first, second, **EXACT)


@pytest.mark.parametrize("tiling", TILINGS)
def test_a_query_whose_blocks_are_all_empty_or_after_it_gives_zero(tiling):
    q, k, v = (torch.randn(1, 20, 2, 3, dtype=torch.float64).requires_grad_() for _ in range(3))
    block_indices = torch.full((1, 20, 2, 4), -1)
    block_indices[..., 0] = 1  # tokens 8 to 15
    block_indices[:, 18:] = -1
    out, lse = selected_attention(q, k, v, block_indices, SMALL, tiling=tiling)
    empty = [*range(8), 18, 19]
    assert (out[:, empty] == 0).all()
    assert (lse[:, empty] == -torch.inf).all()
    assert lse[:, 8:18].isfinite().all()
    dq, dk, dv = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert (dq[:, empty] == 0).all()
    assert all(gradient.isfinite().all() for gradient in (dq, dk, dv))


@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("score", [-1e3, -60.0, 60.0, 1e3])
def test_keys_that_are_not_selected_change_nothing_however_they_score(tiling, score):
    """Also the own one, which usually is selected, and is a tiling's first guess at a typical score."""
    q, k, v = (torch.randn(1, 40, 2, 3, dtype=torch.float64) for _ in range(3))
    block_indices = torch.zeros(1, 40, 2, 1, dtype=torch.int64)  # tokens 0 to 7 alone
    expected = selected_attention(q, k, v, block_indices, SMALL, tiling=tiling)
    k[:, 8:] = score * q[:, 8:] / q[:, 8:].square().sum(-1, keepdim=True) * 3**0.5
    torch.testing.assert_close(
        selected_attention(q, k, v, block_indices, SMALL, tiling=tiling), expected, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("group", [1, 3, 16])
def test_longer_sequences_in_tiny_tiles_equal_the_brute_force(monkeypatch, tiling, group):
    monkeypatch.setattr("nsa.ops.tiles.TILE_ELEMENTS", 1000)
    branch = BRANCHES["selected " + tiling.replace("_", " ")]
    case = branch.case(Layout(t=100, s=130), h=2 * group)
    torch.testing.assert_close(branch.run(case), branch.expected(case), **EXACT)


def test_the_tiling_is_chosen_by_size(monkeypatch):
    chosen = []
    for name in ("_tiles_by_query", "_tiles_by_block", "_tiles_masked"):
        original = getattr(MODULE, name)

        def recorded(*arguments, name=name, original=original):
            chosen.append(name)
            return original(*arguments)

        monkeypatch.setattr(MODULE, name, recorded)
    generator = torch.Generator().manual_seed(0)
    for b, t, s in ((1, 1, 300), (1, 100, 100), (1, 100, 300), (20, 8, 20)):
        block_indices = random_selection(Layout(b=b, t=t, s=s), SMALL, 1, generator)
        selected_attention(
            torch.randn(b, t, 1, 2), torch.randn(b, s, 1, 2), torch.randn(b, s, 1, 2), block_indices, SMALL
        )
    assert chosen == ["_tiles_by_query", "_tiles_masked", "_tiles_by_block", "_tiles_masked"]


@pytest.mark.parametrize(("index", "got"), [(5, "-1 to 5"), (-2, "-2 to 0")])
def test_an_index_outside_the_sequence_is_one_clear_line(index, got):
    q = torch.zeros(1, 20, 1, 2)
    block_indices = torch.tensor([index, 0, -1] if index > 0 else [0, index, -1]).expand(1, 20, 1, 3)
    with pytest.raises(ValueError, match=rf"^selected_attention: .*between -1 and 2 \(20 keys\), got {got}$"):
        selected_attention(q, q, q, block_indices, SMALL)


@pytest.mark.usefixtures("without_shape_checks")
def test_an_unknown_tiling_is_one_clear_line():
    q = torch.zeros(1, 20, 1, 2)
    with pytest.raises(ValueError, match=r"^selected_attention: tiling should be .*, got 'by_row'$"):
        selected_attention(q, q, q, torch.zeros(1, 20, 1, 3, dtype=torch.int32), SMALL, tiling="by_row")
