"""Models whose heads several ranks share, beside the same in one process, in fp64."""

import os
import tempfile

import torch
import torch.distributed as dist
from groups import sizes
from tiny_llama import model, tokens
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from nsa.distributed import context_parallel, tensor_parallel

CLOSE = {"atol": 1e-10, "rtol": 1e-10}


def batch_of(length=44):
    ids = tokens(1, length)
    return {"input_ids": ids, "labels": ids}


def gradients(one, batch, parts=1):
    """Of two passes that add up; FSDP averages what are parts of a mean."""
    for _ in range(2):
        loss = one(**batch).loss
        (loss * parts).backward()
    whole = {}
    for name, parameter in one.named_parameters():
        grad = parameter.grad
        whole[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return loss.detach(), whole


def check(one, wanted, batch):
    loss, grads = gradients(one, batch)
    torch.testing.assert_close(loss, wanted[0], **CLOSE)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, wanted[1][name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


def heads_shared(one, mesh):
    tensor_parallel(one.model, mesh, one.config.base_model_tp_plan, one.config.num_key_value_heads)
    return one


@sizes(2)
def case_heads_shared_by_two():
    batch, mesh = batch_of(), init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    for attention, options in (("nsa", {}), ("nsa", {"attention_bias": True}), ("infllm_v2", {})):
        wanted = gradients(model(attention, **options).train(), batch)
        check(heads_shared(model(attention, **options).train(), mesh), wanted, batch)


@sizes(4)
def case_heads_and_sequences_shared_and_weights_sharded():
    batch = batch_of(45)
    wanted = gradients(model("nsa").train(), batch)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    one = heads_shared(model("nsa").train(), mesh["tp"])
    one.gradient_checkpointing_enable()
    context = context_parallel(one, mesh["cp"])
    for part in (*one.model.layers, one):
        fully_shard(part, mesh=mesh["cp"])
    loss, grads = gradients(one, context.zigzag.shard_batch(batch), parts=2)
    dist.all_reduce(loss, group=mesh["cp"].get_group())
    torch.testing.assert_close(loss, wanted[0], **CLOSE)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, wanted[1][name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@sizes(2)
def case_transformers_plan_trains_and_generates():
    whole, batch = model("nsa"), batch_of()
    wanted = gradients(whole.train(), batch)
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    if dist.get_rank() == 0:
        whole.save_pretrained(folder[0])
    dist.barrier()
    os.environ |= {"RANK": str(dist.get_rank()), "LOCAL_RANK": str(dist.get_rank()), "WORLD_SIZE": "2"}
    one = AutoModelForCausalLM.from_pretrained(folder[0], tp_plan="auto", dtype=torch.double)
    assert isinstance(one.model.layers[0].self_attn.k_proj_win.weight, DTensor)
    check(one.train(), wanted, batch)
    ids = tokens(2, 21)
    for options in ({"do_sample": False}, {"num_beams": 2}):
        got = one.eval().generate(ids, max_new_tokens=9, **options)
        assert torch.equal(got, whole.eval().generate(ids, max_new_tokens=9, **options))
