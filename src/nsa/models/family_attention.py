"""Layers that take over the projections of a trained attention layer, of any family in the table."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nsa.config import InfLLMv2Config, NSAConfig
from nsa.models.layers import LlamaSignature
from nsa.modules.attention import NativeSparseAttention
from nsa.modules.compression import Compression
from nsa.modules.infllm_v2 import InfLLMv2Attention

FUSED = ("q_proj", "k_proj", "v_proj")


class _TakesOver(LlamaSignature):
    """A layer of this library that continues a dense one of transformers; a mixin that stands before the layer's class.

    The projections of q, k, v and the output are the dense layer's own modules; a fused one is taken apart. Normed
    queries and keys stay normed, before rotation, by the same norms everywhere; a factor of the scores other than
    1 / sqrt(d) goes to the queries.

    Args:
        config: the sizes.
        dense: the layer's attention as transformers made it; it must not be used afterwards.
        rotary: cos and sin of (x, positions), for calls of this layer alone.
        layer_idx: its number.
    """

    def __init__(self, config: NSAConfig | InfLLMv2Config, dense: Any, rotary: nn.Module, layer_idx: int) -> None:
        width, maps = dense.head_dim, projections(dense)
        hidden, groups = maps["k_proj"].in_features, maps["k_proj"].out_features // width
        heads, like = maps["q_proj"].out_features // width, maps["k_proj"].weight
        with like.device:
            super().__init__(hidden, heads, groups, width, config=config, rotary=rotary)
        factor = float(dense.scaling) * math.sqrt(width)
        self.layer_idx, self.query_factor = layer_idx, 1.0 if math.isclose(factor, 1.0) else factor
        self.q_norm, self.k_norm = getattr(dense, "q_norm", None), getattr(dense, "k_norm", None)
        for name, one in maps.items():
            setattr(self, name, one)

    def _normed(self, q: Tensor, *keys: Tensor) -> list[Tensor]:
        """Queries with their factor, and keys, [b, t, heads, d], after the family's norms."""
        if self.q_norm is not None:
            q = self.q_norm(q)
        return [
            q if self.query_factor == 1.0 else q * self.query_factor,
            *map(self._normed_key, keys),
        ]

    def _normed_key(self, k: Tensor) -> Tensor:
        return k if self.k_norm is None else self.k_norm(k)


class FamilyAttention(_TakesOver, NativeSparseAttention):  # type: ignore[misc]
    """`NativeSparseAttention` in the place of a family's attention; keys are normed before compression."""

    def __init__(self, config: NSAConfig, dense: Any, rotary: nn.Module, layer_idx: int) -> None:
        super().__init__(config, dense, rotary, layer_idx)
        for name, branch in own_branches(self):
            setattr(self, branch, copy.deepcopy(getattr(self, name)))

    def _heads(self, projected: Sequence[Tensor]) -> list[Tensor]:
        q, *rest = super()._heads(projected)
        q, *rest[::2] = self._normed(q, *rest[::2])
        return [q, *rest]

    def _keys(self, projected: Tensor) -> Tensor:
        return self._normed_key(super()._keys(projected))


class FamilyInfLLMv2Attention(_TakesOver, InfLLMv2Attention):  # type: ignore[misc]
    """`InfLLMv2Attention` in the place of a family's attention."""

    def _heads(self, projected: Sequence[Tensor]) -> list[Tensor]:
        q, k, v = super()._heads(projected)
        return [*self._normed(q, k), v]


LAYERS: dict[str, Any] = {"nsa": FamilyAttention, "infllm_v2": FamilyInfLLMv2Attention}


@torch.no_grad()
def start(attention: NativeSparseAttention, gate_bias: float) -> None:
    """First values of what a dense layer has not, once the rest of the layer, made on meta, has its weights.

    Compression's and the window's keys and values are copies, phi is the mean, and a gate is sigmoid(gate_bias) for the
    selected branch and sigmoid(-gate_bias) for the other two.
    """
    like = attention.k_proj.weight
    for new in (attention.compress_k, attention.compress_v, attention.g_proj):
        new.to_empty(device=like.device)
        for module in new.modules():
            if isinstance(module, nn.Linear | Compression):
                module.reset_parameters()
        new.to(like.dtype)
    attention.g_proj.bias.view(-1, 3).copy_(like.new_tensor([-gate_bias, gate_bias, -gate_bias]))
    for name, branch in own_branches(attention):
        setattr(attention, branch, copy.deepcopy(getattr(attention, name)))


def own_branches(attention: NativeSparseAttention) -> list[tuple[str, str]]:
    """The projections that begin as copies: whose, and their names."""
    if attention.config.shared_kv:
        return []
    return [(name, f"{name}_{branch}") for branch in ("cmp", "win") for name in ("k_proj", "v_proj")]


def projections(dense: Any) -> dict[str, Any]:
    """The maps of an attention layer of transformers under Llama's names."""
    if not hasattr(dense, "qkv_proj"):
        return {name: getattr(dense, name) for name in (*FUSED, "o_proj")}
    fused: Any = dense.qkv_proj
    parts = split_fused(fused.weight, dense)
    with fused.weight.device:
        maps = {name: nn.Linear(fused.in_features, len(part), bias=False) for name, part in parts.items()}
    return {**maps, "o_proj": dense.o_proj}


def split_fused(weight: Tensor, dense: Any) -> dict[str, Tensor]:
    """The rows of a fused projection as q_proj, k_proj and v_proj: views of them."""
    pairs = dense.num_key_value_heads * dense.head_dim
    return dict(zip(FUSED, weight.split([len(weight) - 2 * pairs, pairs, pairs]), strict=True))
