"""Attention of the twins: packed rows are their documents, nothing has T x T elements, one graph for CUDA."""

from itertools import pairwise

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

from nsa.methods import dense
from nsa.models import NSALlamaConfig, NSALlamaForCausalLM, twins

WINDOW = 10
SIZES = {
    "vocab_size": 48, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "nsa": {"window_size": WINDOW},
}  # fmt: skip
LENGTHS = [20, 1, 0, 150, 3, 129, 10, 11, 0, 0]  # tokens of documents, more than a tile and a window among them


def model(attention, **changes):
    torch.manual_seed(0)
    return NSALlamaForCausalLM(NSALlamaConfig(attention=attention, **{**SIZES, **changes})).train().double()


def packed(lengths):
    """Token ids, labels that cross no boundary, and what says where documents are."""
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    ids = torch.randint(48, (1, sum(lengths)), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, cu_seqlens[:-1][torch.tensor(lengths) > 0]] = -100
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return ids, labels, positions, cu_seqlens


def attention_by_hand(q, k, v, cu_seqlens, window, scale):
    """[t, h, d], one query of one head after the other."""
    out = torch.zeros_like(q)
    for start, stop in pairwise(cu_seqlens.tolist()):
        for query in range(start, stop):
            first = start if window is None else max(start, query - window + 1)
            for head in range(q.shape[1]):
                group = head * k.shape[1] // q.shape[1]
                keys, values = k[first : query + 1, group], v[first : query + 1, group]
                out[query, head] = ((keys @ q[query, head]) * scale).softmax(0) @ values
    return out


def heads(t, dtype=torch.float64):
    torch.manual_seed(2)
    return [torch.randn(t, h, 8, dtype=dtype, requires_grad=True) for h in (4, 2, 2)]


def with_gradients(out, of):
    return [out.detach(), *torch.autograd.grad((out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum(), of)]


@pytest.mark.parametrize("attention", ["dense", "window"])
@pytest.mark.parametrize("how", ["cu_seq_lens_q", "position_ids", "both", "position_ids and a mask", "rows"])
def test_a_packed_row_has_loss_and_gradients_of_its_documents_alone(attention, how):
    built, (ids, labels, positions, cu_seqlens) = model(attention), packed(LENGTHS)
    given = {"position_ids": positions} if how.startswith(("position_ids", "both")) else {}
    if not how.startswith("position_ids"):
        given |= {"cu_seq_lens_q": cu_seqlens.int(), "max_length_q": max(LENGTHS)}
    if how == "position_ids and a mask":
        given["attention_mask"] = torch.ones_like(ids)
    if how == "rows":  # documents may go on in the next row; only the last label of a row is lost
        flat, (ids, labels) = labels, (ids.view(4, -1), labels.view(4, -1))
        given["shift_labels"] = torch.cat([flat[:, 1:], torch.full((1, 1), -100)], dim=1).view(4, -1)
    loss = built(ids, labels=labels, num_items_in_batch=100, **given).loss
    ids, labels = ids.view(1, -1), labels.view(1, -1)
    parts = [
        built(ids[:, start:stop], labels=labels[:, start:stop], num_items_in_batch=100).loss
        for start, stop in pairwise(cu_seqlens.tolist())
        if stop > start
    ]
    parameters = list(built.parameters())
    found, expected = torch.autograd.grad(loss, parameters), torch.autograd.grad(sum(parts), parameters)
    torch.testing.assert_close(loss, sum(parts), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("window", [None, 1, 10, 140])
def test_documents_at_a_time_are_attention_by_hand(window):
    q, k, v = heads(sum(LENGTHS))
    _, _, _, cu_seqlens = packed(LENGTHS)
    rows = [x.transpose(0, 1)[None] for x in (q, k, v)]
    out, _ = twins._attend(None, *rows, None, window=window, scaling=0.3, cu_seq_lens_q=cu_seqlens)
    expected = attention_by_hand(q, k, v, cu_seqlens, window, 0.3)
    found = with_gradients(out[0], (q, k, v))
    torch.testing.assert_close(found, with_gradients(expected, (q, k, v)), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("window", [None, 10, 140])
def test_flex_attention_of_packed_rows_is_attention_by_hand_in_one_graph(window):
    q, k, v = (x.detach() for x in heads(sum(LENGTHS)))  # a backward there is none of on a CPU
    _, _, _, cu_seqlens = packed(LENGTHS)
    torch._dynamo.reset()
    flex = torch.compile(dense._flex, fullgraph=True, backend="eager")
    found = flex(q, k, v, cu_seqlens.int(), window, 0.3)
    expected = attention_by_hand(q, k, v, cu_seqlens, window, 0.3)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("window", [None, 1, 10, 128, 140, 300])
@pytest.mark.parametrize("lengths", [LENGTHS, [700], [128, 256, 300], [1] * 300, [255, 1, 0, 257]])
def test_the_block_mask_is_that_of_all_pairs_of_tokens(window, lengths):
    _, _, _, cu_seqlens = packed(lengths)
    found, t = dense.block_mask(cu_seqlens.int(), sum(lengths), window), sum(lengths)
    expected = create_block_mask(found.mask_mod, None, None, t, t, device="cpu", BLOCK_SIZE=dense.TILE)
    assert found.seq_lengths == expected.seq_lengths == (t, t)
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts, wanted = (getattr(mask, f"{kind}_num_blocks") for mask in (found, expected))
        assert torch.equal(counts, wanted), kind
        lists = [getattr(mask, f"{kind}_indices") for mask in (found, expected)]
        for row, count in enumerate(counts[0, 0].tolist()):
            assert torch.equal(*(x[0, 0, row, :count] for x in lists)), kind


@pytest.mark.parametrize("window", [None, 10])
def test_varlen_attn_is_asked_for_the_same_keys(monkeypatch, window):
    def documented(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa=True):
        """(-1, 0): causal; (w, 0): causal, and w keys to the left of the query's own."""
        assert (cu_q is cu_k, cu_q.dtype, max_q, max_k, enable_gqa) == (True, torch.int32, 150, 150, True)
        left, right = window_size
        assert right == 0
        return attention_by_hand(q, k, v, cu_q, None if left == -1 else left + 1, scale)

    monkeypatch.setattr(dense, "varlen_attn", documented)
    q, k, v = heads(sum(LENGTHS))
    _, _, _, cu_seqlens = packed(LENGTHS)
    bounds = cu_seqlens.int()
    found = dense.varlen(q, k, v, bounds, bounds, 150, 150, window, 0.3)
    torch.testing.assert_close(found, attention_by_hand(q, k, v, cu_seqlens, window, 0.3))


@pytest.mark.parametrize("attention", ["dense", "window"])
def test_rows_compile_into_one_graph_for_all_lengths(attention):
    built, graphs = model(attention, num_hidden_layers=1), []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(built, fullgraph=True, dynamic=True, backend=backend)
    for columns in (140, 161, 157):
        ids = torch.randint(48, (2, columns))
        torch.testing.assert_close(compiled(ids, labels=ids).loss, built(ids, labels=ids).loss, rtol=1e-12, atol=0)
    assert len(graphs) == 1


class Largest(TorchDispatchMode):
    """The most elements that any tensor has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, torch.Tensor):
                self.elements = max(self.elements, one.numel())
        return out


@pytest.mark.parametrize("attention", ["dense", "window"])
@pytest.mark.parametrize("layout", ["rows", "packed"])
def test_no_tensor_of_a_training_step_has_t_times_t_elements(attention, layout):
    t = 4096
    built = model(attention, num_hidden_layers=1)
    built, largest = built.float(), Largest()
    ids, _, positions, cu_seqlens = packed([3000, 96, 1000])
    given = {"position_ids": positions, "cu_seq_lens_q": cu_seqlens} if layout == "packed" else {}
    with largest:
        built(ids, labels=ids, **given).loss.backward()
    assert t * SIZES["vocab_size"] <= largest.elements < t * t // 16


@pytest.mark.parametrize("attention", ["dense", "window"])
def test_evaluation_with_a_mask_without_padding_builds_no_mask(attention):
    ids, seen = torch.randint(48, (1, 40)), []
    built = model(attention).eval()
    built.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    padded = torch.arange(40)[None] >= 3
    for mask in (None, torch.ones(1, 40), padded):
        built(ids, attention_mask=mask)
    assert seen[:2] == [None, None]
    assert seen[2].shape == (1, 1, 40, 40)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seq_lens_q": torch.tensor([0, 20, 10, 40])}, r"from 0 to 40 that do not fall, got \[0, 20, 10, 40\]"),
        ({"cu_seq_lens_q": torch.tensor([0, 20])}, r"from 0 to 40 that do not fall, got \[0, 20\]"),
        (
            {"cu_seq_lens_q": torch.tensor([0.0, 40.0])},
            r"should be a 1-D int32 or int64 tensor, got torch.float32 \[2\]",
        ),
        ({"input_ids": torch.ones(2, 40).long()}, r"from 0 to 80 that do not fall, got \[0, 20, 40\]"),
        ({"attention_mask": torch.arange(40)[None] >= 3}, "give it or an attention_mask, not both"),
        ({"use_cache": True, "past_key_values": "full"}, "does not go with past_key_values"),
    ],
)
@pytest.mark.parametrize("attention", ["dense", "window"])
def test_packed_rows_that_cannot_be_are_one_clear_line(attention, change, message):
    built = model(attention)
    ids, cu_seqlens = torch.ones(1, 40).long(), torch.tensor([0, 20, 40])
    if change.get("past_key_values"):
        change = change | {"past_key_values": built.eval()(ids, use_cache=True).past_key_values}
    with pytest.raises(ValueError, match=message):
        built(**({"input_ids": ids, "cu_seq_lens_q": cu_seqlens} | change))


def test_dropout_of_packed_attention_is_refused():
    built, ids = model("dense", attention_dropout=0.1), torch.ones(1, 40).long()
    with pytest.raises(ValueError, match=r"attention_dropout: expected 0 .* got 0\.1"):
        built(ids, cu_seq_lens_q=torch.tensor([0, 20, 40]))
