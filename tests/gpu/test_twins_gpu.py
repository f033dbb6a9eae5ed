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


def gradients(built: NSALlamaForCausalLM, loss: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, list(built.parameters()))]


def packed(built: NSALlamaForCausalLM, run: Any = None) -> list[Tensor]:
    return gradients(built, (built if run is None else run)(**batch(), num_items_in_batch=1000).loss)


def alone(built: NSALlamaForCausalLM) -> list[Tensor]:
    """One document after the other, by PyTorch's plain attention."""
    ids, labels, total = batch()["input_ids"], batch()["labels"], 0.0
    with sdpa_kernel(SDPBackend.MATH):
        for start, stop in pairwise(torch.tensor([0, *LENGTHS]).cumsum(0).tolist()):
            if stop - start > 1:
                part = built(ids[:, start:stop], labels=labels[:, start:stop], num_items_in_batch=1000)
                total = total + part.loss
    return gradients(built, total)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("attention", ["dense", "window"])
def test_a_packed_row_is_its_documents_alone(attention: str, dtype: torch.dtype, compiled: bool) -> None:
    built = model(attention)
    run = torch.compile(built, fullgraph=True) if compiled else built
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        found, plain = packed(built, run), alone(built)
    truth = alone(built.double())
    names = ["loss", *(name for name, _ in built.named_parameters())]
    for name, *three in zip(names, found, plain, truth, strict=True):
        assert_close_to_fp64(*three, name, largest_score=100.0)


@pytest.mark.parametrize("attention", ["dense", "window"])
def test_rows_are_each_row_alone(attention: str) -> None:
    built, ids = model(attention), torch.randint(97, (3, 400), device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        together = gradients(built, built(ids, labels=ids, num_items_in_batch=1).loss)
        with sdpa_kernel(SDPBackend.MATH):
            parts = [built(row[None], labels=row[None], num_items_in_batch=1).loss for row in ids]
        plain = gradients(built, sum(parts))
    truth = gradients(built.double(), built(ids, labels=ids, num_items_in_batch=1).loss)
    for one, other, exact in zip(together, plain, truth, strict=True):
        assert_close_to_fp64(one, other, exact, largest_score=100.0)


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
