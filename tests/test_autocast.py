"""Sums are wide whatever region they are called in: `.backward()` inside of torch.autocast is that outside of it.

The truth is the same call outside, to the bit: no number is to be rounded on the way.
"""

from dataclasses import asdict, replace

import pytest
import torch
from layouts import Layout
from test_functional import SMALL, inputs
from torch import Tensor

from nsa import NativeSparseAttention
from nsa.config import InfLLMv2Config
from nsa.functional import native_sparse_attention
from nsa.methods.nsa import composed_attention
from nsa.models import NSALlamaConfig, NSALlamaForCausalLM
from nsa.ops.causal_attention import causal_attention
from nsa.ops.compress import compress, phi_mean
from nsa.ops.compressed_attention import compressed_attention
from nsa.ops.pooled_selection import pooled_scores
from nsa.ops.selected_attention import selected_attention
from nsa.ops.selection import compressed_attention_and_selection
from nsa.ops.window_attention import window_attention

LAYOUTS = {
    "short, by PyTorch's kernel": Layout(t=8, s=8),
    "whole": Layout(b=2, t=45, s=45),
    "packed": Layout(t=38, s=38, cu_seqlens_q=(0, 20, 23, 23, 38)),
    "ragged": Layout(b=3, t=5, s=25, seqlens_k=(25, 3, 18)),
}
LOW = [torch.bfloat16, torch.float16]


def backward_inside_and_outside(forward, parameters: list[Tensor], dtype: torch.dtype) -> None:
    """The gradients of one forward under autocast, by a backward on each side of the region's end."""
    found = []
    for inside in (True, False):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype):
            loss = forward()
            if inside:
                found.append(torch.autograd.grad(loss, parameters))
        if not inside:
            found.append(torch.autograd.grad(loss, parameters))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_of_the_function(layout: str, dtype: torch.dtype) -> None:
    leaves = [x.float().requires_grad_() for x in inputs(LAYOUTS[layout], d=8, e=8)]
    lengths = LAYOUTS[layout].lengths()
    weights = torch.randn(*leaves[0].shape)
    backward_inside_and_outside(
        lambda: (native_sparse_attention(*leaves, SMALL, **lengths) * weights).sum(), leaves, dtype
    )


def test_where_the_gradient_of_the_output_is_not_finite() -> None:
    """Then the gradient of PyTorch's kernel is computed by tiles."""
    leaves = [x.float().requires_grad_() for x in inputs(LAYOUTS["short, by PyTorch's kernel"], d=8, e=8)[:3]]
    found = []
    for inside in (True, False):
        out = causal_attention(*leaves)
        d_out = torch.linspace(-1, 1, out.numel()).view(out.shape).clone()
        d_out[0, 3, 0, 0] = torch.nan
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            found.append(torch.autograd.grad(out, leaves, d_out))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("compression", ["mean", "linear", "mlp"])
def test_of_the_layer(compression: str, packed: bool) -> None:
    layer = NativeSparseAttention(32, 4, 2, config=replace(SMALL, compression=compression))
    x, cu_seqlens = torch.randn(1 if packed else 2, 40, 32), torch.tensor([0, 25, 40]) if packed else None
    backward_inside_and_outside(
        lambda: layer(x, cu_seqlens=cu_seqlens).square().sum(), list(layer.parameters()), torch.bfloat16
    )


@pytest.mark.parametrize("attention", ["nsa", "dense", "window"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_of_the_model(attention: str, checkpointing: bool) -> None:
    built = NSALlamaForCausalLM(
        NSALlamaConfig(
            vocab_size=48, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=6, attention=attention, nsa=asdict(SMALL),
        )
    ).train()  # fmt: skip
    if checkpointing:
        built.gradient_checkpointing_enable()
    tokens = torch.randint(2, 48, (2, 40))
    backward_inside_and_outside(lambda: built(tokens, labels=tokens).loss, list(built.parameters()), torch.bfloat16)


def test_of_a_compiled_layer() -> None:
    """There the operations are one operator, whose backward computes the forward once more."""
    leaves = [x.float().requires_grad_() for x in inputs(LAYOUTS["whole"], d=8, e=8)]
    q, k, v, gates = leaves
    cmp = [compress(x, phi_mean, SMALL) for x in (k, v)]
    out = composed_attention([q, *cmp, k, v, k, v, gates], [None] * 4, SMALL.sizes, 0.3)
    found = []
    for inside in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            found.append(torch.autograd.grad(out.square().sum(), leaves, retain_graph=True))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def _selected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    indices = compressed_attention_and_selection(q, *(compress(x, phi_mean, SMALL) for x in (k, v)), SMALL)[2]
    return selected_attention(q, k, v, indices, SMALL)[0]


@pytest.mark.parametrize(
    "branch",
    [
        lambda q, k, v: compressed_attention(q, *(compress(x, phi_mean, SMALL) for x in (k, v)), SMALL)[0],
        _selected,
        lambda q, k, v: window_attention(q, k, v, 6)[0],
        lambda q, k, v: causal_attention(q, k, v),
    ],
    ids=["compressed", "selected", "window", "causal"],
)
def test_of_a_branch_by_itself(branch) -> None:
    """Called alone it casts nothing: forward and backward are those outside."""
    leaves = [x.float().requires_grad_() for x in inputs(LAYOUTS["whole"], d=8, e=8)[:3]]
    found = []
    for inside in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            out = branch(*leaves)
            found.append((out, *torch.autograd.grad(out.sin().sum(), leaves)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_of_pooled_scores_by_themselves() -> None:
    config = InfLLMv2Config(
        kernel_size=4, kernel_stride=2, block_size=8, init_blocks=1, window_size=16, topk=4, dense_len=0
    )
    q, k, _, _ = (x.float() for x in inputs(LAYOUTS["whole"], d=8, e=8))
    k_pool = compress(k, phi_mean, config.blocks)
    found = []
    for inside in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            found.append(pooled_scores(q, k_pool, config, num_keys=45))
    assert torch.equal(*found)
