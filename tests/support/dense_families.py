"""Tiny dense models of every family, in fp64, far from their initialisation; between them what Llamas differ in."""

import tiny_llama
import torch
from moved import moved
from tiny_llama import NSA
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from nsa.models import NSALlamaConfig, NSALlamaForCausalLM

SIZES = {name: size for name, size in tiny_llama.SIZES.items() if name != "head_dim"} | {"max_position_embeddings": 256}
FITS = 32  # tokens: num_selected_blocks * select_block_size


def scaled(kind, **more):
    return {"rope_type": kind, "rope_theta": 1000.0, "factor": 4.0, **more}


def gemma2(**more):
    config = Gemma2Config(
        **SIZES,
        head_dim=8,
        attn_logit_softcapping=None,
        final_logit_softcapping=3.0,
        query_pre_attn_scalar=20,
        sliding_window=8,
        **more,
    )
    return Gemma2ForCausalLM(config)


DENSE = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            **SIZES,
            attention_bias=True,
            rope_parameters=scaled(
                "llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
            ),
        )
    ),
    "the dense twin": lambda: NSALlamaForCausalLM(NSALlamaConfig(**SIZES, attention="dense", nsa=NSA)),
    "mistral": lambda: MistralForCausalLM(
        MistralConfig(**SIZES, head_dim=8, sliding_window=None, rope_parameters=scaled("linear"))
    ),
    "qwen2, yarn": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SIZES, rope_parameters=scaled("yarn", original_max_position_embeddings=64))
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SIZES, sliding_window=None)),
    "gemma2": gemma2,
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **SIZES,
            head_dim=8,
            query_pre_attn_scalar=20,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
        )
    ),
}
HYBRID = ("gemma2", "gemma3")  # of which one layer of two attends within a window


def dense(name):
    torch.manual_seed(0)
    built = DENSE[name]().eval().double()
    return moved(built, 0.2)
