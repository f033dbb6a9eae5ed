"""Scores to the second order: what they are, by loops; every layout and split; and what they are for."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from tiny_layer import CONFIG, in_chunks, layer

from nsa import NSACache, NSAConfig, native_sparse_attention
from nsa.cache import StaticNSACache
from nsa.models import NSALlamaConfig, NSALlamaForCausalLM
from nsa.models.cache import NSALlamaCache
from nsa.modules.selector_loss import selector_loss
from nsa.modules.token_layout import TokenLayout
from nsa.ops.selection import select_blocks
from nsa.second_order import mean_and_variance

WIDE = replace(CONFIG, second_order=True)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def by_loops(q, k, v, gates, config):
    """One sequence, [t, ...]: every sum written out."""
    t, heads, d = q.shape
    groups, scale, out = k.shape[1], d**-0.5, torch.zeros(t, heads, v.shape[-1], dtype=q.dtype)
    size, stride, each = config.compress_block_size, config.compress_stride, config.select_block_size
    for i in range(t):
        for g in range(groups):
            mine = range(g * heads // groups, (g + 1) * heads // groups)
            starts = [c * stride for c in range(t) if c * stride + size <= i + 1]
            importance = torch.zeros(i // each + 1, dtype=q.dtype)
            cmp = {}
            for h in mine:
                scores = []
                for start in starts:
                    block = k[start : start + size, g]
                    mean = sum(block) / size
                    variance = sum((key - mean) ** 2 for key in block) / size
                    scores.append(scale * (q[i, h] @ mean) + scale**2 / 2 * (q[i, h] ** 2 @ variance))
                p = torch.stack(scores).softmax(0) if starts else torch.zeros(0, dtype=q.dtype)
                cmp[h] = sum((w * v[s : s + size, g].mean(0) for w, s in zip(p, starts, strict=True)), 0 * v[0, g])
                for weight, start in zip(p, starts, strict=True):
                    for unit in range(start, start + size, stride):  # shares of a block's overlap, eq. 9
                        importance[unit // each] += weight
            forced = {0, *range(max(0, i // each - config.num_local_blocks + 1), i // each + 1)}
            free = sorted(set(range(i // each + 1)) - forced, key=lambda j: (-importance[j].item(), j))
            chosen = sorted({*forced, *free[: max(0, config.num_selected_blocks - len(forced))]})
            seen = [token for j in chosen for token in range(j * each, min((j + 1) * each, i + 1))]
            near = list(range(max(0, i - config.window_size + 1), i + 1))
            for h in mine:
                out[i, h] = gates[i, h, 0] * cmp[h]
                for branch, tokens in ((1, seen), (2, near)):
                    p = (k[tokens, g] @ q[i, h] * scale).softmax(0)
                    out[i, h] += gates[i, h, branch] * (p @ v[tokens, g])
    return out


def test_the_function_is_its_definition_in_loops():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 60, n, 8, dtype=torch.float64) for n in (4, 2, 2))
    gates = torch.rand(1, 60, 4, 3, dtype=torch.float64)
    config = replace(WIDE, num_selected_blocks=4)
    found = native_sparse_attention(2 * q, k, v, gates, config)
    close(found[0], by_loops(2 * q[0], k[0], v[0], gates[0], config))
    assert (found - native_sparse_attention(2 * q, k, v, gates, replace(config, second_order=False))).abs().max() > 0.01


def test_gradients_are_those_of_differences():
    torch.manual_seed(0)
    sizes = {"compress_block_size": 2, "compress_stride": 2, "select_block_size": 4}
    small = NSAConfig(**sizes, num_selected_blocks=3, window_size=3, second_order=True)
    q, k, v = (torch.randn(1, 17, n, 2, dtype=torch.float64, requires_grad=True) for n in (2, 1, 1))
    gates = torch.rand(1, 17, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: native_sparse_attention(*x, small), (q, k, v, gates))


def test_whole_is_chunks_is_decoding_and_packed_and_padded_rows():
    made, x = layer(WIDE), torch.randn(2, 60, 24, dtype=torch.float64)
    mask = torch.ones(2, 60)
    mask[1, :19] = 0
    with torch.no_grad():
        whole = made(x)
        assert (whole - layer()(x)).abs().max() > 1e-3
        for split in ([60], [37, 1, 22], [1] * 60):
            close(in_chunks(made, x, split, NSACache(WIDE)), whole)
        padded = made(x, attention_mask=mask)
        close(padded[0], whole[0])
        close(padded[1, 19:], made(x[1:, 19:])[0])
        bounds = torch.tensor([0, 7, 7, 60, 120])
        packed = made(x.reshape(1, 120, 24), cu_seqlens=bounds)
        for start, end in pairwise(bounds.tolist()):
            if end > start:
                close(packed[:, start:end], made(x.reshape(1, 120, 24)[:, start:end]))


def test_one_key_among_many_is_found_where_the_mean_loses_it():
    """A block with one key that answers the query and fifteen that say the opposite of a fifteenth each."""
    torch.manual_seed(0)
    config = NSAConfig(compress_block_size=16, compress_stride=16, select_block_size=16, num_selected_blocks=4)
    k = 0.1 * torch.randn(1, 320, 1, 8, dtype=torch.float64)
    q = torch.zeros(1, 320, 1, 8, dtype=torch.float64)
    q[..., 0] = 8
    k[0, 96:112, 0, 0] = -4 / 15
    k[0, 101, 0, 0] = 4
    blocks = k.unflatten(1, (20, 16)).transpose(2, 3)
    scale = 8**-0.5
    wide_q = torch.cat([q, q * q * scale / 2], -1)
    found = [
        6 in select_blocks(*given, config, num_keys=320, scale=scale)[0, -1, 0].tolist()
        for given in ((q, blocks.mean(-2)), (wide_q, mean_and_variance(blocks)))
    ]
    assert found == [False, True]


def test_the_selectors_loss_is_that_of_wider_vectors():
    made, x = layer(WIDE), torch.randn(1, 64, 24, dtype=torch.float64)
    layout = TokenLayout.of(x, made.rotary, WIDE)
    q, tokens, _ = made._inputs(x, layout.cos, layout.sin)
    k_cmp = made._compress(tokens.cmp, layout)[0]
    assert k_cmp.shape[-1] == 2 * q.shape[-1]
    torch.manual_seed(1)
    found = selector_loss(q, tokens.slc.k, k_cmp, layout, WIDE)
    # The same scores of plain vectors twice as wide, whose factor is d^-1/2 too.
    d = q.shape[-1]
    wide_q = torch.cat([q, q * q * d**-0.5 / 2], -1) * 2**0.5
    torch.manual_seed(1)
    raw = torch.cat([tokens.slc.k, torch.zeros_like(tokens.slc.k)], -1)
    close(selector_loss(wide_q, raw, k_cmp, layout, CONFIG), found)


def test_a_model_learns_generates_and_is_loaded_with_it(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = NSALlamaConfig(attention="nsa", nsa=WIDE.to_dict(), intermediate_size=32, vocab_size=50, **sizes)
    model = NSALlamaForCausalLM(config).double()
    ids = torch.randint(0, 50, (1, 90))
    model(ids, labels=ids).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    model.save_pretrained(tmp_path)
    again = NSALlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert again.config.nsa_config == WIDE
    tokens = again.generate(ids, max_new_tokens=4, do_sample=False)
    for step in range(4):
        assert tokens[0, 90 + step] == model(tokens[:, : 90 + step]).logits[0, -1].argmax()


def test_what_has_no_place_for_the_variance_says_so():
    with pytest.raises(ValueError, match=r"StaticNSACache: expected second_order=False, got True"):
        StaticNSACache(WIDE, 64)
    config = NSALlamaConfig(attention="nsa", nsa=WIDE.to_dict(), hidden_size=32, num_hidden_layers=1)
    with pytest.raises(ValueError, match="second_order needs layout 'growing', got 'static'"):
        NSALlamaCache(config, layout="static", max_length=64)
    q, k = torch.randn(1, 40, 2, 8), torch.randn(1, 40, 1, 8)
    k_cmp = torch.randn(1, CONFIG.num_compressed_blocks(40), 1, 8)
    with pytest.raises(ValueError, match=r"k_cmp: expected a width of 16, for d = 8 and second_order=True, got 8"):
        native_sparse_attention(q, k, k, torch.rand(1, 40, 2, 3), WIDE, k_cmp=k_cmp, v_cmp=k_cmp)
