"""A decoding step through the layers of a Llama, from embeddings to hidden states.

As modules, a layer is seventeen operations that each wait for the one before, and half of them only carry a few numbers
from one product to the next. Here maps of the same input are one product, a residual is added where its norm is taken,
and one operation stands between the two products of the MLP.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from nsa.backend import resolve
from nsa.cache_tensors import CacheTensors
from nsa.modules.attention import DecodeStep, Gates
from nsa.ops import step as ops


@dataclass(frozen=True)
class SideBySide:
    """Linear maps of one input as one, whose outputs lie side by side.

    weight: of all of them. The maps' own weights become views of it, so that it takes no memory.
    bias: a copy; None where no map has one.
    sizes: columns of each.
    """

    weight: Float[Tensor, "all width"]
    bias: Float[Tensor, " all"] | None
    sizes: list[int]

    @classmethod
    def of(cls, maps: Sequence[nn.Linear]) -> "SideBySide":
        weights: list[Tensor] = [one.weight.detach() for one in maps]
        sizes = [len(weight) for weight in weights]
        ends = [x.data_ptr() + x.numel() * x.element_size() for x in weights]
        if [x.data_ptr() for x in weights[1:]] == ends[:-1]:  # side by side already
            whole = weights[0].as_strided((sum(sizes), weights[0].shape[1]), weights[0].stride())
        else:
            whole = torch.cat(weights)
            for one, part in zip(maps, whole.split(sizes), strict=True):
                one.weight.data = part
        biases = [
            weight.new_zeros(len(weight)) if one.bias is None else one.bias.detach()
            for one, weight in zip(maps, weights, strict=True)
        ]
        return cls(whole, None if all(one.bias is None for one in maps) else torch.cat(biases), sizes)

    def __call__(self, x: Float[Tensor, "rows width"]) -> Float[Tensor, "rows all"]:
        return F.linear(x, self.weight, self.bias)


class StepLayer:
    """A layer of an NSALlama or of its dense twin: its maps, those of the same input side by side."""

    def __init__(self, layer: Any) -> None:
        self.layer, self.attention = layer, layer.self_attn
        self.inputs = SideBySide.of(_inputs(self.attention))
        self.gate_and_up = SideBySide.of([layer.mlp.gate_proj, layer.mlp.up_proj])

    def attend(
        self, x: Float[Tensor, "rows hidden"], tensors: CacheTensors, step: DecodeStep
    ) -> Float[Tensor, "rows hidden"]:
        """NSA of normed hidden states."""
        *projected, gates = self.inputs(x).view(*step.cos.shape[:2], -1).split(self.inputs.sizes, dim=-1)
        gates = gates.sigmoid().unflatten(-1, (-1, 3))
        out = self.attention.decode_heads(projected, gates, tensors, step)
        return self.attention.o_proj(out.flatten(0, 1).flatten(1))

    def mlp(self, x: Float[Tensor, "rows hidden"]) -> Float[Tensor, "rows hidden"]:
        return self.layer.mlp.down_proj(operations_for(x).swiglu(self.gate_and_up(x)))


class StepDecoder:
    """All layers of a model, without embedding and head."""

    def __init__(self, model: Any) -> None:
        self.layers, self.norm = [StepLayer(layer) for layer in model.layers], model.norm

    @classmethod
    def of(cls, model: Any) -> "StepDecoder | None":
        """None where a layer is more than its weights: adapters, quantized weights, hooks, another activation."""
        return cls(model) if all(map(_is_plain, model.layers)) else None

    def __call__(
        self, embeds: Float[Tensor, "b t hidden"], caches: Sequence[CacheTensors], step: DecodeStep
    ) -> Float[Tensor, "b t hidden"]:
        """Hidden states after all layers and the last norm; the tokens are appended to the caches."""
        hidden, update = embeds.flatten(0, 1), None
        for layer, tensors in zip(self.layers, caches, strict=True):
            hidden, x = add_norm(hidden, update, layer.layer.input_layernorm)
            hidden, x = add_norm(hidden, layer.attend(x, tensors, step), layer.layer.post_attention_layernorm)
            update = layer.mlp(x)
        return add_norm(hidden, update, self.norm)[1].view_as(embeds)


def add_norm(hidden: Tensor, update: Tensor | None, norm: LlamaRMSNorm) -> tuple[Tensor, Tensor]:
    """`nsa.ops.step.add_norm` with a norm of the model."""
    return operations_for(hidden).add_norm(hidden, update, norm.weight, norm.variance_epsilon)


def operations_for(hidden: Float[Tensor, "rows hidden"]) -> ModuleType:
    """`nsa.ops.step`, or the kernels that do the same."""
    rows = hidden[:, None, None, :8]  # the width of a row does not matter here, as a head's would
    if resolve(rows, rows) == "triton":
        from nsa.kernels import step as kernels  # only where triton is installed

        return kernels
    return ops


def _inputs(attention: Any) -> list[nn.Linear]:
    if hasattr(attention, "input_projections"):
        return [*attention.input_projections(), attention.gate_proj]
    return [attention.q_proj, attention.k_proj, attention.v_proj]


def _is_plain(layer: Any) -> bool:
    attention, mlp = layer.self_attn, layer.mlp
    maps = [*_inputs(attention), attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    return (
        all(type(one) in (nn.Linear, Gates) for one in maps)
        and all(isinstance(norm, LlamaRMSNorm) for norm in (layer.input_layernorm, layer.post_attention_layernorm))
        and type(mlp) is LlamaMLP
        and mlp.config.hidden_act == "silu"
        and len({(p.dtype, p.device) for p in layer.parameters()}) == 1
        and not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in layer.modules())
    )
