"""A training loop of one's own: weights sharded by FSDP2, every sequence shared by all ranks (context parallelism).

    torchrun --nproc-per-node 2 examples/context_parallel.py

Without torchrun one process does the same alone.
"""

import os

import torch
import torch.distributed as dist
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard

from nsa.distributed import context_parallel
from nsa.models import NSALlamaConfig, NSALlamaForCausalLM

alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
for name, value in alone.items():
    os.environ.setdefault(name, value)
device = "cuda" if torch.cuda.is_available() else "cpu"
if device == "cuda":
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
mesh = init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("cp",))

torch.manual_seed(0)  # the same weights on every rank, of which each then keeps its part
sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
nsa = {"compress_block_size": 16, "compress_stride": 8, "select_block_size": 32, "window_size": 64}
model = NSALlamaForCausalLM(NSALlamaConfig(nsa=nsa, num_attention_heads=4, num_key_value_heads=2, **sizes))
model.to(device).train()

context = context_parallel(model, mesh["cp"])
for part in (*model.model.layers, model):
    fully_shard(part, mesh=mesh["cp"])
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

for step in range(3):
    # Every rank draws the same row of two documents, and takes its part of it.
    row = torch.randint(256, (1, 1000), generator=torch.Generator().manual_seed(step)).to(device)
    bounds = torch.tensor([0, 400, 1000], dtype=torch.int32, device=device)
    labels = row.clone()
    labels[0, bounds[:-1].long()] = -100  # nothing predicts a document's first token
    batch = {"input_ids": row, "labels": labels, "cu_seq_lens_q": bounds, "max_length_q": 600}
    loss = model(**context.zigzag.shard_batch(batch)).loss
    (loss * mesh.size()).backward()  # FSDP averages over ranks, but a rank's loss is its part of the mean already
    optimizer.step()
    optimizer.zero_grad()
    whole = loss.detach()
    dist.all_reduce(whole)
    if dist.get_rank() == 0:
        print(f"step {step}: loss {whole.item():.4f}")
dist.destroy_process_group()
