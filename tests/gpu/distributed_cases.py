"""Context parallelism and FSDP2 over NCCL: as one GPU, and the same bits every time."""

import torch
import torch.distributed as dist
from groups import sizes
from torch.distributed import init_device_mesh

from nsa import NativeSparseAttention, NSAConfig
from nsa.backend import use_backend
from nsa.distributed import context_parallel
from nsa.models import NSALlamaConfig, NSALlamaForCausalLM
from nsa.testing import assert_close_to_fp64
from nsa.training.sharded import shard_weights

DEVICE = "cuda"
NAMES = ("out", "dx")
INFLLM_V2 = {"window_size": 128, "topk": 6, "dense_len": 0}
LENGTH, DOCUMENTS = 2069, (0, 350, 355, 370, 1100, 1100, 2000, 2069)  # two ranks' chunks are of 518 tokens


def passes(layer, x, d_out, **sequences):
    """Output, and gradients of x and of the parameters."""
    x = x.detach().requires_grad_()
    out = layer(x, **sequences)
    return [out.detach(), *torch.autograd.grad(out, [x, *layer.parameters()], d_out)]


def check_layer(dtype, *, packed):
    torch.manual_seed(0)
    layer = NativeSparseAttention(256, 16, 2, 64, config=NSAConfig(num_selected_blocks=8)).to(DEVICE, dtype)
    x, d_out = (torch.randn(1, LENGTH, 256, device=DEVICE, dtype=dtype) for _ in range(2))
    sequences = {"cu_seqlens": torch.tensor(DOCUMENTS, dtype=torch.int32, device=DEVICE)} if packed else {}
    with use_backend("torch"):
        plain = passes(layer, x, d_out, **sequences)
        truth = passes(layer.double(), x.double(), d_out.double(), **sequences)
    layer.to(dtype)

    context = context_parallel(layer, dist.group.WORLD)
    zigzag = context.zigzag
    given = {"input_ids": x[..., 0]} | ({"cu_seq_lens_q": sequences["cu_seqlens"]} if packed else {})
    own = {"cu_seqlens": zigzag.shard_batch(given)["cu_seq_lens_q"]} if packed else {}
    first, second = (passes(layer, zigzag.shard(x), zigzag.shard(d_out), **own) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other), "two runs of the same differ"
    whole = [context.gather(y)[:, :LENGTH] for y in first[:2]]
    for grad in first[2:]:
        total = grad.float()
        dist.all_reduce(total)
        whole.append(total)
    names = (*NAMES, *(name for name, _ in layer.named_parameters()))
    for name, got, exact, usual in zip(names, whole, truth, plain, strict=True):
        assert_close_to_fp64(got.to(usual.dtype), usual, exact, name, largest_score=100.0)


@sizes(2)
def case_layer_rows_bf16():
    check_layer(torch.bfloat16, packed=False)


@sizes(2)
def case_layer_rows_fp32():
    check_layer(torch.float32, packed=False)


@sizes(2)
def case_layer_packed_documents_across_ranks_bf16():
    check_layer(torch.bfloat16, packed=True)


@sizes(2)
def case_layer_packed_documents_across_ranks_fp32():
    check_layer(torch.float32, packed=True)


def losses(attention, *, shared):
    """Of three steps of a small model, packed rows, bf16 autocast; and a weight at their end."""
    torch.manual_seed(0)
    config = NSALlamaConfig(
        attention=attention, vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=2, head_dim=64, max_position_embeddings=4096, infllm_v2=INFLLM_V2,
    )  # fmt: skip
    model = NSALlamaForCausalLM(config).to(DEVICE).train()
    ids = torch.randint(512, (1, LENGTH), device=DEVICE)
    bounds = torch.tensor(DOCUMENTS, dtype=torch.int32, device=DEVICE)
    batch = {"input_ids": ids, "labels": ids, "cu_seq_lens_q": bounds, "max_length_q": 1024}
    if shared:
        mesh = init_device_mesh(DEVICE, (dist.get_world_size(),))
        batch = context_parallel(model, mesh).zigzag.shard_batch(batch)
        shard_weights(model, mesh, in_bf16=True, gather_once=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    found = []
    for _ in range(3):
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = model(**batch).loss
        (loss * dist.get_world_size() if shared else loss).backward()  # FSDP averages
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        if shared:
            dist.all_reduce(total)
        found.append(total)
    weight = model.model.norm.weight
    return torch.stack(found), weight.full_tensor() if shared else weight.detach()


def check_model(attention):
    first, second = (losses(attention, shared=True) for _ in range(2))
    assert all(map(torch.equal, first, second)), "two runs of the same differ"
    alone = losses(attention, shared=False)
    torch.testing.assert_close(first[0], alone[0], atol=0, rtol=torch.finfo(torch.bfloat16).eps)


@sizes(2)
def case_model_sharded_nsa():
    check_model("nsa")


@sizes(2)
def case_model_sharded_infllm_v2():
    check_model("infllm_v2")


@sizes(2)
def case_model_sharded_dense():
    torch.use_deterministic_algorithms(True)  # FlashAttention's backward repeats its sums only then
    check_model("dense")


@sizes(2)
def case_model_sharded_window():
    torch.use_deterministic_algorithms(True)
    check_model("window")
