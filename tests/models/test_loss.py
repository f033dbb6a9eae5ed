"""The loss without all logits: value and gradients, chunks, weights, what is labelled, what is compiled."""

import pytest
import torch
import torch.nn.functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

from nsa.models import NSALlamaConfig, NSALlamaForCausalLM, loss
from nsa.models.loss import lm_loss, lm_loss_of_logits
from nsa.testing import assert_close_to_fp64


def inputs(rows=2, columns=9, width=5, vocabulary=11, dtype=torch.float64):
    torch.manual_seed(0)
    hidden = torch.randn(rows, columns, width, dtype=dtype, requires_grad=True)
    head = torch.randn(vocabulary, width, dtype=dtype, requires_grad=True)
    labels = torch.randint(vocabulary, (rows, columns))
    labels[0, 3] = labels[1, :4] = loss.IGNORED
    return hidden, head, labels, torch.rand(rows, columns, dtype=dtype)


def by_hand(hidden, head, labels, weights, count):
    """One token at a time."""
    total, labelled = hidden.new_zeros(()), 0
    for row in range(len(labels)):
        for place in range(1, labels.shape[1]):
            if labels[row, place] != loss.IGNORED:
                scores = (head * hidden[row, place - 1]).sum(-1)
                probability = scores.exp()[labels[row, place]] / scores.exp().sum()
                total = total - weights[row, place] * probability.log()
                labelled += 1
    return total / (count or labelled)


def with_gradients(value, *of):
    return [value.detach(), *torch.autograd.grad(value, of)]


@pytest.mark.parametrize("chunk", [11 * 3, 11 * 5, 11, 10**6])
@pytest.mark.parametrize("count", [None, 7, torch.tensor(7)])
def test_value_and_gradients_are_those_of_single_tokens_in_chunks_of_any_size(monkeypatch, chunk, count):
    monkeypatch.setattr(loss, "CHUNK", chunk)
    hidden, head, labels, weights = inputs()
    expected = with_gradients(by_hand(hidden, head, labels, weights, count), hidden, head)
    found = lm_loss(hidden, head, labels, weights=weights, num_items_in_batch=count)
    torch.testing.assert_close(with_gradients(found, hidden, head), expected, rtol=1e-12, atol=1e-12)
    whole = lm_loss_of_logits(hidden @ head.T, labels, weights=weights, num_items_in_batch=count)
    torch.testing.assert_close(with_gradients(whole, hidden, head), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("arguments", [{}, {"num_items_in_batch": 7}, {"shift_labels": True}])
def test_it_is_transformers_loss(arguments):
    hidden, head, labels, _ = (x.float() if x.is_floating_point() else x for x in inputs())
    hidden, head = hidden.detach().requires_grad_(), head.detach().requires_grad_()
    if "shift_labels" in arguments:
        arguments["shift_labels"] = F.pad(labels, (0, 1), value=loss.IGNORED)[:, 1:].contiguous()
    expected = ForCausalLMLoss(hidden @ head.T, labels, head.shape[0], **arguments)
    found = lm_loss(hidden, head, labels, **arguments)
    torch.testing.assert_close(with_gradients(found, hidden, head), with_gradients(expected, hidden, head))


def test_in_bf16_it_is_as_close_to_fp64_as_plain_pytorch(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", 100 * 64)
    hidden, head, labels, _ = inputs(2, 150, 32, 64)
    high = [x.detach().bfloat16().double().requires_grad_() for x in (hidden, head)]
    low = [x.detach().float().requires_grad_() for x in high]
    truth = with_gradients(plain_loss(*high, labels), *high)
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradients(lm_loss(*low, labels), *low)
        plain = with_gradients(plain_loss(*low, labels), *low)
    for name, *three in zip(("loss", "hidden", "head"), found, plain, truth, strict=True):
        assert_close_to_fp64(*three, name)


def plain_loss(hidden, head, labels):
    logits = F.linear(hidden, head)[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), labels[:, 1:].flatten())


@pytest.mark.parametrize("frozen", ["hidden", "head", "both"])
def test_what_is_frozen_gets_no_gradient_and_changes_nothing(frozen):
    hidden, head, labels, weights = inputs()
    expected = with_gradients(by_hand(hidden, head, labels, weights, None), hidden, head)
    hidden.requires_grad_(frozen == "head")
    head.requires_grad_(frozen == "hidden")
    value = lm_loss(hidden, head, labels, weights=weights)
    torch.testing.assert_close(value.detach(), expected[0], rtol=1e-12, atol=1e-12)
    if frozen == "both":
        assert not value.requires_grad
        return
    place, trained = (1, hidden) if frozen == "head" else (2, head)
    torch.testing.assert_close(*torch.autograd.grad(value, trained), expected[place], rtol=1e-12, atol=1e-12)


def test_compiled_it_is_one_graph_for_all_lengths(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", 11 * 5)
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lm_loss, fullgraph=True, dynamic=True, backend=backend)
    for columns in (9, 8, 10, 7):
        hidden, head, labels, weights = inputs(columns=columns)
        expected = with_gradients(by_hand(hidden, head, labels, weights, None), hidden, head)
        found = with_gradients(compiled(hidden, head, labels, weights=weights), hidden, head)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert len(graphs) <= 2  # with padding of the last chunk and without


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, "expected labels or shift_labels, got neither"),
        (
            {"labels": torch.ones(2, 8, dtype=torch.long), "weights": None},
            r"expected labels \[2, 9\] and a head \[v, 5\]",
        ),
        ({"weights": torch.ones(2, 8)}, r"expected weights \[2, 9\] as labels, got \[2, 8\]"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(change, message):
    hidden, head, labels, weights = inputs()
    with pytest.raises(ValueError, match=message):
        lm_loss(hidden, head, **({"labels": labels, "weights": weights} | change))


SIZES = {"vocab_size": 48, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 6}  # fmt: skip


def model(**changes):
    torch.manual_seed(0)
    return NSALlamaForCausalLM(NSALlamaConfig(attention="dense", **{**SIZES, **changes})).train().double()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_in_training_has_the_loss_and_gradients_of_its_logits_and_returns_none_of_them(weighted, tied):
    built, ids = model(tie_word_embeddings=tied), torch.randint(48, (2, 12))
    extra = {"weights": torch.rand(2, 12)} if weighted else {}
    out = built(ids, labels=ids, num_items_in_batch=20, **extra)
    assert out.logits is None
    expected = lm_loss_of_logits(built(ids).logits, ids, num_items_in_batch=20, **extra)
    parameters = list(built.parameters())
    torch.testing.assert_close(
        with_gradients(out.loss, *parameters), with_gradients(expected, *parameters), rtol=1e-10, atol=1e-12
    )


def test_an_evaluated_model_returns_logits_beside_the_same_loss():
    built, ids, weights = model(), torch.randint(48, (2, 12)), torch.rand(2, 12)
    for extra in ({}, {"weights": weights}):
        trained = built.train()(ids, labels=ids, **extra).loss
        out = built.eval()(ids, labels=ids, **extra)
        torch.testing.assert_close(out.loss, trained, rtol=1e-5, atol=1e-6, check_dtype=False)  # transformers': in fp32
        torch.testing.assert_close(out.logits, built(ids).logits, rtol=0, atol=0)
        loss_first, logits = built(ids, labels=ids, return_dict=False, use_cache=False, **extra)
        assert (loss_first == out.loss).all()
        assert (logits == out.logits).all()


def test_a_loss_of_the_users_and_a_head_with_hooks_still_see_all_logits():
    built, ids = model(), torch.randint(48, (2, 12))
    built.loss_function = lambda logits, labels, **kwargs: logits.sum()
    out = built(ids, labels=ids)
    torch.testing.assert_close(out.loss, out.logits.sum())
    hooked = model()
    hooked.lm_head.register_forward_hook(lambda module, args, out: out * 2)
    out = hooked(ids, labels=ids)
    torch.testing.assert_close(out.logits, 2 * model()(ids).logits)
