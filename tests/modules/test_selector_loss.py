"""The selector's own loss: by loops over tokens, in every layout; what it reaches, and that it is added as it says."""

import math
from dataclasses import replace

import pytest
import torch

import nsa.modules.selector_loss as module
from nsa import NSAConfig
from nsa.distributed.layout import ContextLayout
from nsa.modules.attention import NativeSparseAttention
from nsa.modules.selector_loss import selector_loss, with_loss
from nsa.modules.token_layout import TokenLayout
from nsa.ops.block_divergence import LEAST
from nsa.testing import brute_force_selection

CONFIG = NSAConfig(compress_block_size=8, compress_stride=4, select_block_size=8, num_selected_blocks=4, window_size=16)


def layer(config=CONFIG):
    torch.manual_seed(0)
    made = NativeSparseAttention(24, 4, 2, 8, config=config).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return made


def by_loops(q, k, k_cmp, config=CONFIG):
    """The divergence of every query of one sequence, [t], NaN where it has no free block."""
    t, heads, d = q.shape
    scores = brute_force_selection.block_scores(q, k_cmp, t, config, None)
    found = []
    for position in range(t):
        own = position // config.select_block_size
        free = list(range(config.num_initial_blocks, own - config.num_local_blocks + 1))
        each = []
        for group in range(k.shape[1]):
            mass = torch.zeros(own + 1, dtype=q.dtype)
            for head in range(group * heads // k.shape[1], (group + 1) * heads // k.shape[1]):
                p = (k[: position + 1, group] @ q[position, head] * d**-0.5).softmax(0)
                for key in range(position + 1):
                    mass[key // config.select_block_size] += p[key]
            wanted, said = (x[free] / x[free].sum().clamp(min=LEAST) for x in (mass, scores[position, group]))
            each.append((wanted * (wanted.clamp(min=LEAST) / said.clamp(min=LEAST)).log()).sum())
        found.append(sum(each) / len(each) if free else torch.tensor(math.nan, dtype=q.dtype))
    return torch.stack(found)


def parts(made, x, **where):
    layout = TokenLayout.of(x, made.rotary, made.config, **where)
    q, tokens, _ = made._inputs(layout.sort(x), layout.cos, layout.sin)
    return q, tokens, layout


ALL = 10**6  # queries: in runs of neighbours, which cover rows that they divide


@pytest.mark.parametrize(
    ("lengths", "neighbours"), [([60], 12), ([7, 60, 3, 41], 37), ([60, 1, 2, 41, 40], 16), ([5, 8], 1), ([5, 8], 99)]
)
def test_of_packed_sequences_it_is_the_mean_of_all_queries_with_a_free_block(monkeypatch, lengths, neighbours):
    monkeypatch.setattr(module, "NEIGHBOURS", neighbours)
    made, x = layer(), torch.randn(1, sum(lengths), 24, dtype=torch.float64)
    bounds = torch.tensor([0, *lengths, 0, 0]).cumsum(0).int()
    each = []
    for sequence in x[0].split(lengths):
        q, tokens, layout = parts(made, sequence[None])
        each.append(by_loops(q[0], tokens.slc.k[0], made._compress(tokens.cmp, layout)[0][0]))
    found = torch.cat(each)
    wanted = found[~found.isnan()].mean() if max(lengths) >= 24 else found.new_zeros(())
    for longest in (None, 64):
        q, tokens, layout = parts(made, x, cu_seqlens=bounds, max_seqlen=longest)
        loss = selector_loss(q, tokens.slc.k, made._compress(tokens.cmp, layout)[0], layout, CONFIG, ALL)
        torch.testing.assert_close(loss, wanted)


@pytest.mark.parametrize("neighbours", [1, 8])
def test_of_rows_and_of_padded_rows_too(monkeypatch, neighbours):
    monkeypatch.setattr(module, "NEIGHBOURS", neighbours)
    made, x = layer(), torch.randn(2, 60, 24, dtype=torch.float64)
    mask = torch.ones(2, 60)
    mask[1, :19] = 0
    for given, kept in ((None, (60, 60)), (mask, (60, 41))):
        each = []
        for row, count in zip(x, kept, strict=True):
            q, tokens, layout = parts(made, row[None, 60 - count :])
            each.append(by_loops(q[0], tokens.slc.k[0], made._compress(tokens.cmp, layout)[0][0]))
        found = torch.cat(each)
        seen = []
        made.selector_weight, made.selector_queries, hook = 1.0, ALL, module.block_divergence

        def keep(*args, hook=hook, seen=seen):
            seen.append(hook(*args))
            return seen[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "block_divergence", keep)
            made(x, attention_mask=given)
        torch.testing.assert_close(seen[0], found[~found.isnan()].mean())


@pytest.mark.parametrize(("queries", "looked_at"), [(1, 1), (32, 32), (100, 96), (ALL, 112)])
def test_it_looks_at_runs_of_neighbours_of_no_more_queries_than_it_is_told(queries, looked_at, monkeypatch):
    made, x = layer(), torch.randn(2, 60, 24, dtype=torch.float64)
    seen = []
    monkeypatch.setattr(module, "block_divergence", lambda *args: seen.append(args[4].token) or args[0].new_zeros(()))
    made.selector_weight, made.selector_queries = 1.0, queries
    made(x)
    tokens = seen[0]
    assert tokens.numel() == looked_at == tokens.unique().numel()
    assert (tokens.diff() == 1).all()


def test_its_gradient_is_that_of_its_values(monkeypatch):
    monkeypatch.setattr(module, "NEIGHBOURS", 12)
    made, x = layer(), torch.randn(1, 60, 24, dtype=torch.float64)
    q, tokens, layout = parts(made, x)
    k_cmp = made._compress(tokens.cmp, layout)[0].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda k_cmp: selector_loss(q, tokens.slc.k, k_cmp, layout, CONFIG, ALL), k_cmp)


def test_it_is_added_to_what_is_differentiated_and_reaches_what_makes_compressed_keys_and_nothing_before_the_layer():
    made, x = layer(), torch.randn(1, 64, 24, dtype=torch.float64, requires_grad=True)
    gradients = []
    for weight in (0.0, 0.25, 0.5):
        made.selector_weight = weight
        made.zero_grad()
        torch.manual_seed(3)
        (1e3 * made(x).square().sum()).backward()
        gradients.append({name: p.grad.clone() for name, p in [*made.named_parameters(), ("x", x)]})
        x.grad = None
    plain, quarter, half = gradients
    for name in plain:
        added, twice = quarter[name] - plain[name], half[name] - plain[name]
        reached = name.startswith(("k_proj_cmp", "compress_k"))
        assert (added.abs().max() > 1e-6) == reached, name
        torch.testing.assert_close(twice, 2 * added, atol=1e-6, rtol=1e-4)


def test_ranks_that_share_sequences_or_heads_cannot_have_it():
    made, x = layer(), torch.randn(1, 32, 24, dtype=torch.float64)
    made.selector_weight = 0.25
    message = "whole sequences and all heads on a rank: expected selector_weight=0, got 0.25"
    with pytest.raises(ValueError, match=message):
        made.attend_in_context(x, ContextLayout.__new__(ContextLayout))
    made.compress_k.heads_of = object()
    with pytest.raises(ValueError, match=message):
        made(x)


def test_descending_it_brings_the_scores_to_the_attention():
    made, x = layer(replace(CONFIG, compression="linear")), torch.randn(4, 64, 24, dtype=torch.float64)
    own = [p for name, p in made.named_parameters() if name.startswith(("k_proj_cmp", "compress_k"))]
    optimizer, losses = torch.optim.Adam(own, lr=0.01), []
    for _ in range(60):
        q, tokens, layout = parts(made, x)
        loss = selector_loss(q, tokens.slc.k, made._compress(tokens.cmp, layout)[0], layout, made.config)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_the_gradient_of_with_loss_is_the_weight_whatever_comes_from_above():
    x, loss = torch.randn(3, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    (7 * with_loss(x, loss, 0.3)).sum().backward()
    assert loss.grad == torch.tensor(0.3)
    assert x.grad.tolist() == [7.0] * 3
