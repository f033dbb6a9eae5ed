"""The tiny models of these tests, in fp64, far from their initialisation."""

import torch
from moved import moved

from nsa.models import NSALlamaConfig, NSALlamaForCausalLM

NSA = {
    "compress_block_size": 8,
    "compress_stride": 4,
    "select_block_size": 8,
    "num_selected_blocks": 4,
    "window_size": 10,
}
# Four of the blocks of 4: the first, the query's own, the one before and one more.
INFLLM_V2 = {"kernel_size": 4, "kernel_stride": 2, "block_size": 4, "window_size": 4, "topk": 3, "dense_len": 0}
SIZES = {
    "vocab_size": 48,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
TWINS = ("nsa", "infllm_v2", "dense", "window")


def config(attention="nsa", **kwargs) -> NSALlamaConfig:
    if attention == "infllm_v2":
        kwargs = {"infllm_v2": INFLLM_V2, **kwargs}
    return NSALlamaConfig(attention=attention, nsa=NSA, **{**SIZES, **kwargs})


def model(attention="nsa", **kwargs) -> NSALlamaForCausalLM:
    torch.manual_seed(0)
    built = NSALlamaForCausalLM(config(attention, **kwargs)).eval().double()
    return moved(built, 0.2)


def tokens(rows, columns, seed=1):
    return torch.randint(2, SIZES["vocab_size"], (rows, columns), generator=torch.Generator().manual_seed(seed))
