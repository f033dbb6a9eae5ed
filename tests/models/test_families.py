"""Every family of the table: what a dense model is after its attention was swapped."""

import subprocess
import sys

import pytest
import torch
from dense_families import DENSE, FITS, HYBRID, NSA, dense
from tiny_llama import tokens
from transformers import AutoModelForCausalLM

from nsa.config import NSAConfig
from nsa.models import swap_attention
from nsa.models.families import FAMILIES, sparse_class
from nsa.modules import selector_loss
from nsa.testing import brute_force

SHUT = 40.0  # a gate bias: in fp64 the other branches' gates are below 1e-17


@pytest.fixture(scope="module", params=DENSE)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def pair(name):
    """A dense model and one that shares its weights; with gates half open and every new weight somewhere."""
    before = dense(name)
    after = swap_attention(before, nsa=NSA, gate_bias=0.5)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in after.parameters():
            if storage(parameter) not in map(storage, before.parameters()):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return before, after


def storage(parameter):
    return parameter.untyped_storage().data_ptr()


def close(one, other):
    """As near as norms allow that transformers computes in fp32."""
    torch.testing.assert_close(one.float(), other.float())


def test_where_every_block_fits_a_swapped_model_is_the_dense_one(name):
    before, ids = dense(name), tokens(2, FITS)
    with torch.no_grad():
        close(swap_attention(before, nsa=NSA, gate_bias=SHUT)(ids).logits, before(ids).logits)
        close(swap_attention(before, nsa={**NSA, "shared_kv": True}, gate_bias=SHUT)(ids).logits, before(ids).logits)
        longer = tokens(2, 2 * FITS)
        apart = swap_attention(before, nsa=NSA, gate_bias=SHUT)(longer).logits - before(longer).logits
    assert apart[:, :FITS].abs().max() < 1e-5 < apart[:, FITS:].abs().max()


def test_a_swapped_model_shares_the_weights_and_adds_gates_phi_and_copies(name, pair):
    before, after = pair
    storages = {storage(x) for x in before.parameters()}
    shared = {n for n, x in after.named_parameters() if storage(x) in storages}
    new = {n for n, _ in after.named_parameters()} - shared
    assert sum(x.numel() for n, x in after.named_parameters() if n in shared) == sum(
        x.numel() for x in before.parameters()
    )
    assert new
    assert all(any(part in n for part in ("g_proj", "compress_", "_cmp.", "_win.")) for n in new)
    layers = {int(n.split(".layers.")[1].split(".")[0]) for n in new}
    assert layers == set(after.config.sparse_layers) == ({1} if name in HYBRID else {0, 1})


def test_a_swapped_layer_is_the_paper_over_the_familys_queries_and_keys(name, pair, monkeypatch):
    """The family's own projections, norms, factor and rotation; then the brute force, past what fits. The selector's
    loss is of the same queries, keys and compressed keys."""
    before, after = pair
    layer, config, t = after.model.layers[1].self_attn, NSAConfig.from_dict(NSA), 50
    theirs = before.model.layers[1].self_attn
    torch.manual_seed(3)
    x = torch.randn(1, t, 24, dtype=torch.float64)
    kinds = {"layer_type": "full_attention"} if name == "gemma3" else {}
    factors = before.model.rotary_emb(x, torch.arange(t)[None], **kinds)

    def rotated(y):
        cos, sin = (factor[0, : y.shape[0]].unsqueeze(1) for factor in factors)
        low, high = y.chunk(2, dim=-1)
        return y * cos + torch.cat([-high, low], -1) * sin

    def heads(projected, norm=None):
        y = projected[0].unflatten(-1, (-1, layer.head_dim))
        return y if norm is None else norm(y)

    q_norm, k_norm = (getattr(theirs, f"{one}_norm", None) for one in "qk")
    q = rotated(heads(layer.q_proj(x), q_norm))
    k, v = heads(layer.k_proj(x), k_norm), heads(layer.v_proj(x))
    k_win, v_win = heads(layer.k_proj_win(x), k_norm), heads(layer.v_proj_win(x))
    raw = heads(layer.k_proj_cmp(x), k_norm), heads(layer.v_proj_cmp(x))
    k_cmp, v_cmp = (
        brute_force.compress(y, config, lambda block, phi=phi: phi(block))
        for y, phi in zip(raw, (layer.compress_k, layer.compress_v), strict=True)
    )
    firsts = torch.arange(0, len(k_cmp) * config.compress_stride, config.compress_stride)
    every = torch.zeros(t, *k_cmp.shape[1:], dtype=torch.float64)
    every[firsts] = k_cmp
    gates = layer.g_proj(x).sigmoid()[0].unflatten(-1, (-1, 3))
    with torch.no_grad():
        out = brute_force.native_sparse_attention(
            q, rotated(k), v, gates, config, k_cmp=rotated(every)[firsts], v_cmp=v_cmp, k_win=rotated(k_win),
            v_win=v_win, scale=theirs.scaling,
        )  # fmt: skip
        close(layer(x)[0][0], layer.o_proj(out.flatten(1)))
    lost: list = []
    monkeypatch.setattr(selector_loss, "block_divergence", lambda *given: lost.extend(given) or x.new_zeros(()))
    monkeypatch.setattr(layer, "selector_weight", 1.0)
    layer(x)
    wanted = (q * theirs.scaling * layer.head_dim**0.5, rotated(k), rotated(every)[firsts])
    for one, other in zip(lost, wanted, strict=False):
        close(one[0], other)


def test_a_swapped_model_generates_with_a_cache_what_it_gives_without(pair):
    """Rows padded on the left, over 30 to 44 tokens; in chunks; and each row as it does alone."""
    _, after = pair
    ids, mask = tokens(2, 40), torch.ones(2, 40, dtype=torch.long)
    ids[0, :7], mask[0, :7] = 0, 0
    ends = {"max_new_tokens": 4, "do_sample": False}
    expected = after.generate(ids, attention_mask=mask, use_cache=False, **ends)
    assert torch.equal(after.generate(ids, attention_mask=mask, prefill_chunk_size=16, **ends), expected)
    assert torch.equal(after.generate(ids[:1, 7:], **ends), expected[:1, 7:])


def test_packed_rows_are_what_each_gives_alone(pair):
    _, after = pair
    ids, sizes = tokens(1, 90), [45, 37, 8]
    positions = torch.cat([torch.arange(size) for size in sizes])[None]
    ends = torch.tensor([0, *torch.tensor(sizes).cumsum(0)], dtype=torch.int32)
    with torch.no_grad():
        alone = torch.cat([after(part, use_cache=False).logits for part in ids.split(sizes, dim=1)], dim=1)
        close(after(ids, position_ids=positions, use_cache=False).logits, alone)
        close(after(ids, cu_seq_lens_q=ends, max_length_q=45, use_cache=False).logits, alone)


def test_every_new_weight_learns(pair):
    _, after = pair
    ids = tokens(2, 50)
    after.zero_grad()
    after.train()(ids, labels=ids).loss.backward()
    after.eval()
    assert [n for n, x in after.named_parameters() if x.grad is None or not x.grad.any()] == []


def test_saved_it_is_loaded_by_the_auto_classes_as_it_was(pair, tmp_path):
    _, after = pair
    after.save_pretrained(tmp_path)
    loaded, found = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
    assert type(loaded) is type(after)
    assert not any(found.values())
    ids = tokens(2, 60)
    with torch.no_grad():
        close(loaded.eval()(ids).logits, after(ids).logits)


INFLLM = {"kernel_size": 8, "kernel_stride": 4, "block_size": 8, "window_size": 8, "topk": 3, "dense_len": 20}


def test_infllm_v2_is_the_dense_model_with_its_weights_as_far_as_it_reads_all(name):
    """Past that its blocks count, and a cache gives what none gives."""
    before, ids = dense(name), tokens(2, 60)
    after = swap_attention(before, "infllm_v2", infllm_v2=INFLLM)
    all_read = after.config.infllm_v2_config.sees_all
    assert {n for n, _ in after.named_parameters()} >= {n for n, _ in before.named_parameters() if "qkv" not in n}
    assert sum(x.numel() for x in after.parameters()) == sum(x.numel() for x in before.parameters())
    with torch.no_grad():
        close(after(ids[:, :all_read]).logits, before(ids[:, :all_read]).logits)
        assert (after(ids).logits - before(ids).logits).abs().max() > 1e-3
    ends = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(after.generate(ids, **ends), after.generate(ids, use_cache=False, **ends))


@pytest.mark.parametrize("layers", [[1], {"dense": [0]}])
def test_layers_that_stay_dense_are_the_familys_own(layers):
    before = dense("qwen3")
    after = swap_attention(before, layers=layers, nsa=NSA)
    assert (after.config.dense_layers, after.config.sparse_layers) == ([0], [1])
    ids = tokens(1, 60)
    states = [model(ids, output_hidden_states=True).hidden_states[1] for model in (before, after)]
    assert torch.equal(*states)
    with pytest.raises(ValueError, match="layers that stay dense need the growing cache"):
        after.generate(ids, max_new_tokens=2, cache_implementation="static")


@pytest.mark.parametrize("method", ["nsa", "infllm_v2"])
@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForTokenClassification"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_classifier_keeps_its_head(family, head, method):
    config = dense(family).config
    before = FAMILIES[family].theirs(head)(config).eval().double()
    sizes = {"nsa": NSA, "gate_bias": SHUT} if method == "nsa" else {"infllm_v2": INFLLM}
    after, ids = swap_attention(before, method, **sizes), tokens(2, 16)
    assert type(after) is sparse_class(FAMILIES[family], head)
    with torch.no_grad():
        close(after(ids).logits, before(ids).logits)
    after(ids, labels=tokens(2, 16) % 2 if "Token" in head else torch.tensor([0, 1])).loss.backward()
    assert after.score.weight.grad.any()


def test_a_folder_loads_where_nothing_of_nsa_was_imported(tmp_path):
    """By its auto_map, and is saved again with it; as a classifier too."""
    after = swap_attention(dense("qwen3"), nsa=NSA)
    after.save_pretrained(tmp_path / "one")
    code = f"""
import sys, torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
trust = dict(trust_remote_code=True, dtype=torch.float64)
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "one")!r}, **trust)
torch.save(model(torch.arange(2, 42)[None]).logits, {str(tmp_path / "logits.pt")!r})
model.save_pretrained({str(tmp_path / "two")!r})
classifier = AutoModelForSequenceClassification.from_pretrained({str(tmp_path / "two")!r}, num_labels=3, **trust)
print(type(classifier).__name__)
"""
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "NSAQwen3ForSequenceClassification"
    assert torch.equal(torch.load(tmp_path / "logits.pt"), after(torch.arange(2, 42)[None]).logits)
    assert {path.name for path in (tmp_path / "one").iterdir()} == {path.name for path in (tmp_path / "two").iterdir()}
