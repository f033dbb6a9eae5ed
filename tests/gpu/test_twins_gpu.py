"""Twins on a GPU: packed rows by varlen_attn and FlexAttention, compiled in one graph, without reading a length."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nsa.models import NSALlamaConfig, NSALlamaForCausalLM
from nsa.models.loss import lm_loss, lm_loss_of_logits
from nsa.testing import assert_close_to_fp64

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]  # the compiler's own are no errors

LENGTHS = [700, 1, 0, 129, 64, 300, 6, 0, 0]


def model(attention: str) -> NSALlamaForCausalLM:
    torch.manual_seed(0)
    config = NSALlamaConfig(
        attention=attention, vocab_size=97, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=2, head_dim=32, initializer_range=0.1, nsa={"window_size": 100},
    )  # fmt: skip
    return NSALlamaForCausalLM(config).cuda().train()


def batch() -> dict[str, Tensor | int]:
    cu_seqlens = torch.tensor([0, *LENGTHS], device="cuda").cumsum(0).int()
    ids = torch.randint(97, (1, sum(LENGTHS)), device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    labels = ids.clone()
    labels[0, cu_seqlens[:-3].long()] = -100
    return {"input_ids": ids, "labels": labels, "cu_seq_lens_q": cu_seqlens, "max_length_q": 1024}


def results(built: NSALlamaForCausalLM, logits: list[Tensor], loss: Tensor) -> dict[str, Tensor]:
    """Logits of all tokens, the loss, and the gradients of all parameters."""
    named = dict(built.named_parameters())
    found = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    return {"logits": torch.cat(logits, 1), "loss": loss.detach(), **found}


def logits_of(run: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return run(**inputs, use_cache=False).logits


def packed(built: NSALlamaForCausalLM, run: Any) -> dict[str, Tensor]:
    """The loss of `run`, which may be compiled, and its gradients; the logits of the model as it is."""
    inputs = batch()
    loss = run(**inputs, num_items_in_batch=1000).loss
    del inputs["labels"]
    return results(built, [logits_of(built, **inputs)], loss)


def alone(built: NSALlamaForCausalLM) -> dict[str, Tensor]:
    """One document after the other, by PyTorch's plain attention."""
    ids, labels, logits, total = batch()["input_ids"], batch()["labels"], [], 0.0
    with sdpa_kernel(SDPBackend.MATH):
        for start, stop in pairwise(torch.tensor([0, *LENGTHS]).cumsum(0).tolist()):
            if stop > start:
                logits.append(logits_of(built, input_ids=ids[:, start:stop]))
            if stop - start > 1:
                part = built(ids[:, start:stop], labels=labels[:, start:stop], num_items_in_batch=1000)
                total = total + part.loss
    return results(built, logits, total)


def compare(found: dict[str, Tensor], plain: dict[str, Tensor], truth: dict[str, Tensor], dtype: torch.dtype) -> None:
    """In bf16 the errors of a thousand tokens cancel in their sum by chance: there logits are judged, not the loss."""
    for name in truth:
        if name != "loss" or dtype == torch.float32:
            assert_close_to_fp64(found[name], plain[name], truth[name], name, largest_score=100.0)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("attention", ["dense", "window"])
def test_a_packed_row_is_its_documents_alone(attention: str, dtype: torch.dtype, compiled: bool) -> None:
    built = model(attention)
    run = torch.compile(built, fullgraph=True) if compiled else built
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        found, plain = packed(built, run), alone(built)
    compare(found, plain, alone(built.double()), dtype)


@pytest.mark.parametrize("attention", ["dense", "window"])
def test_rows_are_each_row_alone(attention: str) -> None:
    built, ids = model(attention), torch.randint(97, (3, 400), device="cuda")

    def together() -> dict[str, Tensor]:
        return results(built, [logits_of(built, input_ids=ids)], built(ids, labels=ids, num_items_in_batch=1).loss)

    with torch.autocast("cuda", torch.bfloat16):
        found = together()
        with sdpa_kernel(SDPBackend.MATH):
            logits = [logits_of(built, input_ids=row[None]) for row in ids]
            parts = [built(row[None], labels=row[None], num_items_in_batch=1).loss for row in ids]
        plain = results(built, [torch.cat(logits)], sum(parts))
    built.double()
    compare(found, plain, together(), torch.bfloat16)


@pytest.mark.parametrize("attention", ["dense", "window"])
def test_a_compiled_step_waits_for_nothing(attention: str) -> None:
    built, inputs = model(attention), batch()
    compiled = torch.compile(built, fullgraph=True)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            compiled(**inputs).loss.backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("compiled", [False, True])
def test_the_loss_of_a_large_vocabulary_takes_a_fraction_of_its_logits_memory(compiled: bool) -> None:
    tokens, width, vocabulary = 8192, 256, 100_000  # 3.3 GB of logits in fp32
    hidden = torch.randn(1, tokens, width, device="cuda", requires_grad=True)
    head = torch.randn(vocabulary, width, device="cuda", requires_grad=True)
    labels = torch.randint(vocabulary, (1, tokens), device="cuda")
    loss = torch.compile(lm_loss, fullgraph=True) if compiled else lm_loss

    def run() -> list[Tensor]:
        with torch.autocast("cuda", torch.bfloat16):
            value = loss(hidden, head, labels)
        return [value.detach(), *torch.autograd.grad(value, (hidden, head))]

    run()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = run()
    assert torch.cuda.max_memory_allocated() - before < 0.7 * 4 * tokens * vocabulary
    with torch.autocast("cuda", torch.bfloat16):
        value = lm_loss_of_logits(torch.nn.functional.linear(hidden, head), labels)
    plain = [value.detach(), *torch.autograd.grad(value, (hidden, head))]
    high = [x.detach().double().requires_grad_() for x in (hidden, head)]
    value = lm_loss_of_logits(high[0] @ high[1].T, labels)
    truth = [value.detach(), *torch.autograd.grad(value, high)]
    for three in zip(found, plain, truth, strict=True):
        assert_close_to_fp64(*three, largest_score=100.0)
