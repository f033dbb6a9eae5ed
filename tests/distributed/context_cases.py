"""Layers and models over several ranks beside the same in one process, in fp64."""

import torch
import torch.distributed as dist
from groups import sizes
from moved import moved
from tiny_llama import INFLLM_V2, TWINS, model, tokens

from nsa import NativeSparseAttention, NSAConfig
from nsa.config import InfLLMv2Config
from nsa.distributed import context_parallel
from nsa.modules.infllm_v2 import InfLLMv2Attention

NSA = {
    "compress_block_size": 8, "compress_stride": 4, "select_block_size": 8, "num_selected_blocks": 4, "window_size": 10,
}  # fmt: skip
CLOSE = {"atol": 1e-10, "rtol": 1e-10}


def layer(method="nsa", **options):
    if method == "infllm_v2":
        made = InfLLMv2Attention(24, 4, 2, 6, config=InfLLMv2Config(**{**INFLLM_V2, **options})).double()
    else:
        made = NativeSparseAttention(24, 4, 2, 6, config=NSAConfig(**{**NSA, **options})).double()
    return moved(made, 0.3)


def check_layer(b, t, bounds=None, positions=None, **options):
    whole = layer(**options)
    x = torch.randn(b, t, 24, dtype=torch.double, requires_grad=True)
    d_out = torch.randn_like(x)
    sequences = {} if bounds is None else {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32)}
    if positions is not None:
        sequences["position_ids"] = positions
    out = whole(x, **sequences)
    wanted = torch.autograd.grad(out, [x, *whole.parameters()], d_out)

    context = context_parallel(whole, dist.group.WORLD)
    batch = {"input_ids": torch.zeros(b, t), "position_ids": positions, "cu_seq_lens_q": sequences.get("cu_seqlens")}
    batch = context.zigzag.shard_batch(batch)
    part = context.zigzag.shard(x.detach()).requires_grad_()
    got = whole(part, cu_seqlens=batch["cu_seq_lens_q"], position_ids=batch["position_ids"])
    grads = torch.autograd.grad(got, [part, *whole.parameters()], context.zigzag.shard(d_out))
    torch.testing.assert_close(context.gather(got.detach())[:, :t], out.detach(), **CLOSE)
    torch.testing.assert_close(context.gather(grads[0])[:, :t], wanted[0], **CLOSE)
    for got, want in zip(grads[1:], wanted[1:], strict=True):
        dist.all_reduce(got)
        torch.testing.assert_close(got, want, **CLOSE)


@sizes(2, 3, 4)
def case_layer_rows():
    check_layer(2, 53)


@sizes(2, 3, 4)
def case_layer_packed_documents_that_cross_ranks_and_are_shorter_than_a_block():
    check_layer(1, 50, [0, 13, 14, 17, 17, 38, 50])


@sizes(3, 8)
def case_layer_chunks_shorter_than_a_block():
    check_layer(1, 22, [0, 9, 22])


@sizes(4)
def case_layer_one_token_a_chunk():
    check_layer(1, 8, shared_kv=True)


@sizes(2)
def case_layer_shared_keys_and_positions_of_the_callers():
    check_layer(1, 41, [0, 20, 41], positions=torch.arange(41)[None] * 3, shared_kv=True, compression="linear")


@sizes(2, 3)
def case_infllm_v2_layer():
    check_layer(2, 53, method="infllm_v2")
    check_layer(1, 50, [0, 13, 14, 17, 17, 38, 50], method="infllm_v2", dense_len=24)
    check_layer(1, 61, [0, 61], positions=torch.arange(61)[None] * 2, method="infllm_v2", coarse_lse=True)


def check_model(attention, *, packed, **options):
    whole = model(attention, **options).train()
    if options.get("use_cache") is False:
        whole.gradient_checkpointing_enable()
    ids = tokens(1, 62)
    batch = {"input_ids": ids, "labels": ids.clone(), "weights": torch.rand(1, 62, dtype=torch.double)}
    if packed:
        bounds = torch.tensor([0, 21, 23, 60, 62], dtype=torch.int32)
        batch["labels"][0, bounds[:-1]] = -100
        starts = bounds[:-1].repeat_interleave(bounds.diff())
        batch.update(cu_seq_lens_q=bounds, max_length_q=64, position_ids=(torch.arange(62) - starts)[None])
    loss = whole(**batch).loss
    loss.backward()
    wanted = {name: parameter.grad for name, parameter in whole.named_parameters()}
    whole.zero_grad()

    context = context_parallel(whole, dist.group.WORLD)
    part = whole(**context.zigzag.shard_batch(batch)).loss
    part.backward()
    total = part.detach().clone()
    dist.all_reduce(total)
    torch.testing.assert_close(total, loss.detach(), **CLOSE)
    for name, parameter in whole.named_parameters():
        dist.all_reduce(parameter.grad)
        torch.testing.assert_close(parameter.grad, wanted[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@sizes(2)
def case_model_rows():
    for attention in TWINS:
        check_model(attention, packed=False)


@sizes(3)
def case_model_packed():
    for attention in TWINS:
        check_model(attention, packed=True)


@sizes(2)
def case_model_whose_layers_are_computed_again_in_backward():
    check_model("nsa", packed=True, use_cache=False)
