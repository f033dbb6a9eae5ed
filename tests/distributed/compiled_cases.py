"""Compiled layers, bf16 autocast and checkpointing in several processes, beside one process in fp64 without any.

What torch.compile traces, and the backward that it makes, are those of a user's run; code is not generated here, which
has nothing to do with processes and takes a C++ compiler minutes.
"""

import torch
import torch.distributed as dist
from groups import sizes
from tiny_llama import model, tokens
from torch._dynamo.utils import counters
from torch.distributed import init_device_mesh
from torch.distributed.tensor import DTensor

from nsa.testing import assert_close_to_fp64
from nsa.training import compiling
from nsa.training.config import TrainConfig
from nsa.training.sharded import distribute
from nsa.training.world import World

LENGTH, PACKED = 62, ((0, 21, 23, 60, 62), (0, 40, 62))


def batch_of(bounds):
    ids = tokens(1, LENGTH)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    return {"input_ids": ids, "labels": ids.clone(), "cu_seq_lens_q": cu_seqlens, "max_length_q": LENGTH}


def gradients(one, bounds, *, zigzag=None, autocast=True, parts=1):
    batch = batch_of(bounds) if zigzag is None else zigzag.shard_batch(batch_of(bounds))
    one.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = one(**batch).loss
    (loss * parts).backward()
    grads = {name: parameter.grad for name, parameter in one.named_parameters()}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()}


def check(rows, *, shard=1, cp=1, tp=1, compiled=True, gather_once=False):
    compiling._options = lambda cuda_graphs: {"backend": "aot_eager"}
    mesh = init_device_mesh("cpu", (1, shard * cp, tp), mesh_dim_names=("dp_replicate", "fsdp", "tp"))
    contexts = init_device_mesh("cpu", (1, shard, cp, tp), mesh_dim_names=("dp_replicate", "dp_shard", "cp", "tp"))
    world, parts = World(mesh, contexts, dist.HashStore()), model().float().train()
    parts.gradient_checkpointing_enable({"use_reentrant": False})
    config = TrainConfig(compile=compiled, dtype="bfloat16", gradient_checkpointing=True, gather_once=gather_once)
    distribute(parts, world, config, on_cpu=True)
    whole, exact = model().float().train(), model().train()
    with torch.no_grad():
        for parameter in whole.model.layers.parameters():  # as they are gathered
            parameter.copy_(parameter.bfloat16())
    counters.clear()
    for bounds in rows:
        found = gradients(parts, bounds, zigzag=world.zigzag, parts=cp)
        usual, truth = gradients(whole, bounds), gradients(exact, bounds, autocast=False)
        # All of them at once: a rank rounds its own part of a sum, which shows where the sum nearly cancels.
        one, plain, exactly = (torch.cat([x[name].flatten() for name in truth]) for x in (found, usual, truth))
        assert_close_to_fp64(one, plain, exactly, f"{bounds}", largest_score=100.0)
    # Two layers and other documents share their graphs: a first number of documents, and any.
    assert (0 < counters["stats"]["unique_graphs"] <= 8) == compiled, dict(counters["stats"])


@sizes(2)
def case_weights_sharded():
    check(PACKED[:1], shard=2)


@sizes(2)
def case_sequences_shared():
    check(PACKED, cp=2, gather_once=True)


@sizes(8)
def case_weights_sequences_and_heads_shared_not_compiled():
    check(PACKED[:1], shard=2, cp=2, tp=2, compiled=False)
