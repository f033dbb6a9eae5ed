"""A decoder layer in a decoding step: four products, and the attention between the first and the second.

As modules, a layer is seventeen operations that each wait for the one before, of which ten only carry a few numbers
from one product to the next. Here each product takes its norm in front and its gate, sigmoid or residual behind along
(`nsa.ops.project`), and the input projections are one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from nsa.backend import resolve
from nsa.cache_tensors import CacheTensors
from nsa.modules.attention import DecodeStep, Gates
from nsa.ops.project import project


@dataclass(frozen=True)
class PackedProjections:
    """Linear maps of one input as one: a copy of their weights, side by side.

    sizes: columns of each.
    """

    weight: Float[Tensor, "all hidden"]
    bias: Float[Tensor, " all"]
    sizes: list[int]

    @classmethod
    def of(cls, projections: Sequence[nn.Linear]) -> "PackedProjections":
        weights: list[Tensor] = [p.weight for p in projections]
        sizes = [p.out_features for p in projections]
        biases: list[Tensor] = [
            weights[0].new_zeros(size) if p.bias is None else p.bias for p, size in zip(projections, sizes, strict=True)
        ]
        return cls(torch.cat(weights).detach(), torch.cat(biases).detach(), sizes)


@dataclass(frozen=True)
class StepLayer:
    """A decoder layer of the model with the weights that a step reads."""

    layer: Any
    inputs: PackedProjections

    @classmethod
    def of(cls, layer: Any) -> "StepLayer | None":
        """None where the layer is more than its weights: adapters, quantized weights, hooks, another activation."""
        attention, mlp = layer.self_attn, layer.mlp
        linear = [*attention.input_projections(), attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        norms = (layer.input_layernorm, layer.post_attention_layernorm)
        is_plain = (
            all(type(p) is nn.Linear for p in linear)
            and type(attention.gate_proj) is Gates
            and all(isinstance(norm, LlamaRMSNorm) for norm in norms)
            and type(mlp) is LlamaMLP
            and mlp.config.hidden_act == "silu"
            and not mlp.config.mlp_bias
            and len({(p.dtype, p.device) for p in layer.parameters()}) == 1
            and not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in layer.modules())
        )
        if not is_plain:
            return None
        return cls(layer, PackedProjections.of([*attention.input_projections(), attention.gate_proj]))

    def __call__(
        self, hidden: Float[Tensor, "rows hidden"], tensors: CacheTensors, step: DecodeStep
    ) -> Float[Tensor, "rows hidden"]:
        """Hidden states of the tokens, rows of them one after another, after this layer."""
        attention, norm, inputs = self.layer.self_attn, self.layer.input_layernorm, self.inputs
        gates_from = sum(inputs.sizes[:-1])
        projected = projection_for(hidden)(
            hidden, inputs.weight, inputs.bias, norm=norm.weight, eps=norm.variance_epsilon, sigmoid_from=gates_from
        )
        *heads, gates = projected.view(*step.cos.shape[:2], -1).split(inputs.sizes, dim=-1)
        out = attention.decode_heads(heads, gates.unflatten(-1, (-1, 3)), tensors, step)
        return behind_attention(self.layer, hidden, out.flatten(0, 1).flatten(1))


def behind_attention(
    layer: Any, hidden: Float[Tensor, "rows hidden"], out: Float[Tensor, "rows heads"]
) -> Float[Tensor, "rows hidden"]:
    """The rest of a layer of Llama, dense ones too: output projection, residual, MLP, residual."""
    project, o_proj = projection_for(hidden), layer.self_attn.o_proj
    norm, mlp = layer.post_attention_layernorm, layer.mlp
    hidden = project(out, o_proj.weight, o_proj.bias, add=hidden)
    inside = project(hidden, mlp.gate_proj.weight, norm=norm.weight, eps=norm.variance_epsilon, up=mlp.up_proj.weight)
    return project(inside, mlp.down_proj.weight, add=hidden)


def projection_for(hidden: Float[Tensor, "rows hidden"]) -> Callable[..., Tensor]:
    """`nsa.ops.project.project`, or the kernel where it serves."""
    rows = hidden[:, None, None, :8]  # the width of a row does not matter here, as a head's would
    if resolve(rows, rows) == "triton":
        from nsa.kernels import project as kernels  # only where triton is installed

        if kernels.serves(hidden):
            return kernels.project
    return project
