"""Layers with Llama's signature: one a method, and Llama's norm."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from nsa.decode_step import DecodeStep
from nsa.distributed.layout import ContextLayout
from nsa.models.configuration import NSALlamaConfig
from nsa.modules.attention import NativeSparseAttention
from nsa.modules.infllm_v2 import InfLLMv2Attention
from nsa.modules.rotary import RotaryFactors
from nsa.modules.token_layout import TokenLayout

# What a mixin stands before: a layer of this library.
Layer: Any = object


class LlamaSignature(Layer):
    """The signature of Llama's attention; a mixin that stands before a layer of this library."""

    layer_idx: int

    def forward(
        self,
        hidden_states: Tensor,
        past_key_values: Cache | None = None,
        token_mask: Tensor | None = None,
        layout: TokenLayout | ContextLayout | None = None,
        factors: RotaryFactors | None = None,
        decode_step: DecodeStep | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if past_key_values is None:
            return super().forward(hidden_states, layout=layout), None
        layer = past_key_values.layers[self.layer_idx]
        if decode_step is not None:
            return self.decode(hidden_states, layer.nsa.tensors, decode_step), None
        out = super().forward(hidden_states, cache=layer.nsa, attention_mask=token_mask, factors=factors)
        layer.num_columns += hidden_states.shape[1]
        return out, None


class NSALlamaAttention(LlamaSignature, NativeSparseAttention):  # type: ignore[misc]
    """`NativeSparseAttention` as Llama's attention."""

    def __init__(self, config: NSALlamaConfig, layer_idx: int, llamas: torch.nn.Module) -> None:
        super().__init__(*_dims(config), config=config.nsa_config, **_rotary_and_bias(config))
        self.layer_idx = layer_idx


class InfLLMv2LlamaAttention(LlamaSignature, InfLLMv2Attention):  # type: ignore[misc]
    """`InfLLMv2Attention` as Llama's attention, with its projections: one seed gives it and the dense twin the same."""

    def __init__(self, config: NSALlamaConfig, layer_idx: int, llamas: torch.nn.Module) -> None:
        with torch.random.fork_rng(devices=[]):
            super().__init__(*_dims(config), config=config.infllm_v2_config, **_rotary_and_bias(config))
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, getattr(llamas, name))
        self.layer_idx = layer_idx


def _dims(config: NSALlamaConfig) -> tuple[int, int, int, int]:
    return config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim


def _rotary_and_bias(config: NSALlamaConfig) -> dict[str, Any]:
    return {"rotary": LlamaRotaryEmbedding(config), "bias": config.attention_bias}


LAYERS = {"nsa": NSALlamaAttention, "infllm_v2": InfLLMv2LlamaAttention}


class FusedRMSNorm(LlamaRMSNorm):
    """Llama's norm in one operation instead of seven, rounded once, and in fp64 where x is."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        dtype = hidden_states.dtype
        if torch.promote_types(dtype, self.weight.dtype) == dtype:  # weights may be gathered in 16 bit
            return F.rms_norm(hidden_states, self.weight.shape, self.weight.to(dtype), self.variance_epsilon)
        return super().forward(hidden_states)
