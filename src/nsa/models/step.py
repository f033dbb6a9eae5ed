"""A decoding step through a Llama, from token ids to hidden states.

As modules, a layer is seventeen operations that each wait for the one before, of which ten only carry a few numbers
from one product to the next. Here it is two norms, four products and the attention: maps of the same input are one
product, and gates, sigmoids and residuals belong to the product before them. Embeddings and rotary factors are one
launch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding

from nsa.backend import resolve
from nsa.cache_tensors import CacheTensors
from nsa.decode_step import DecodeStep
from nsa.modules.projections import is_hooked, is_plain
from nsa.ops import step as ops


@dataclass(frozen=True)
class SideBySide:
    """Linear maps of one input as one, whose outputs lie side by side.

    weight: of all of them. The maps' own weights become views of it, so that it takes no memory.
    bias: a copy, zeros where a map has none.
    sizes: columns of each.
    """

    weight: Float[Tensor, "all width"]
    bias: Float[Tensor, " all"]
    sizes: list[int]

    @classmethod
    def of(cls, maps: Sequence[nn.Linear]) -> "SideBySide":
        weights: list[Tensor] = [one.weight.detach() for one in maps]
        sizes = [len(weight) for weight in weights]
        ends = [x.data_ptr() + x.numel() * x.element_size() for x in weights]
        if [x.data_ptr() for x in weights[1:]] == ends[:-1]:  # side by side already
            whole = weights[0].as_strided((sum(sizes), weights[0].shape[1]), weights[0].stride())
        else:
            with torch.inference_mode(False):  # the weights stay trainable ones
                whole = torch.cat(weights)
            for one, part in zip(maps, whole.split(sizes), strict=True):
                one.weight.data = part
        biases = [
            weight.new_zeros(len(weight)) if one.bias is None else one.bias.detach()
            for one, weight in zip(maps, weights, strict=True)
        ]
        return cls(whole, torch.cat(biases), sizes)


class StepLayer:
    """A layer of an NSALlama or of its dense twin, around its attention."""

    def __init__(self, layer: Any) -> None:
        self.layer, self.attention = layer, layer.self_attn
        self.inputs = SideBySide.of(_inputs(self.attention))

    def attend(
        self, x: Float[Tensor, "rows hidden"], tensors: CacheTensors, step: DecodeStep
    ) -> Float[Tensor, "rows heads"]:
        """NSA of normed hidden states, without the output projection."""
        maps = self.inputs
        projected = operations_for(x).project(x, maps.weight, maps.bias, sigmoid_from=sum(maps.sizes[:-1]))
        *parts, gates = projected.view(tensors.rows, -1, projected.shape[-1]).split(maps.sizes, dim=-1)
        out = self.attention.decode_heads(parts, gates.unflatten(-1, (-1, 3)), tensors, step)
        return out.flatten(0, 1).flatten(1)

    def behind_attention(
        self, hidden: Float[Tensor, "rows hidden"], out: Float[Tensor, "rows heads"]
    ) -> Float[Tensor, "rows hidden"]:
        """The output projection and the MLP, each with its residual."""
        project, o_proj, mlp = operations_for(hidden).project, self.attention.o_proj, self.layer.mlp
        hidden = project(out, o_proj.weight, o_proj.bias, add=hidden)
        x = norm(hidden, self.layer.post_attention_layernorm)
        inside = project(x, mlp.gate_proj.weight, up=mlp.up_proj.weight)
        return project(inside, mlp.down_proj.weight, add=hidden)


class StepDecoder:
    """All of a model but its head."""

    def __init__(self, model: Any) -> None:
        self.layers, self.norm = [StepLayer(layer) for layer in model.layers], model.norm
        self.embedding, self.rotary, self.config = model.embed_tokens, model.rotary_emb, model.config
        self.begins_plainly = (
            type(self.embedding) is nn.Embedding
            and self.embedding.max_norm is None
            and type(self.rotary) is LlamaRotaryEmbedding
            and self.rotary.rope_type not in ("dynamic", "longrope")  # whose frequencies change with the length
            and not any(is_hooked(m) for one in (self.embedding, self.rotary) for m in one.modules())
        )

    @classmethod
    def of(cls, model: Any) -> "StepDecoder | None":
        """None where a layer is more than its weights: adapters, quantized weights, hooks, another activation."""
        return cls(model) if all(map(_is_plain, model.layers)) else None

    def __call__(
        self, input_ids: Int[Tensor, "b t"], caches: Sequence[CacheTensors], counts: Int32[Tensor, " b"] | None
    ) -> Float[Tensor, "b t hidden"]:
        """Hidden states after all layers and the last norm; the tokens are appended to the caches."""
        embeds, step = self.begin(input_ids, caches[0].lengths, counts)
        hidden = embeds.flatten(0, 1)
        for layer, tensors in zip(self.layers, caches, strict=True):
            out = layer.attend(norm(hidden, layer.layer.input_layernorm), tensors, step)
            hidden = layer.behind_attention(hidden, out)
        return norm(hidden, self.norm).view_as(embeds)

    def begin(
        self, input_ids: Int[Tensor, "b t"], lengths: Int32[Tensor, " b"], counts: Int32[Tensor, " b"] | None
    ) -> tuple[Float[Tensor, "b t hidden"], DecodeStep]:
        """Embeddings, and what the layers share."""
        table, rotary, config = self.embedding.weight, self.rotary, self.config.nsa_config
        if self.begins_plainly and operations_for(table[: input_ids.numel()]) is not ops:
            from nsa.kernels.step_begin import begin

            embeds, *factors = begin(
                input_ids, table, lengths, counts, rotary.inv_freq, rotary.attention_scaling, config
            )
            return embeds, DecodeStep(counts, *factors)
        embeds = self.embedding(input_ids)
        return embeds, DecodeStep.after(lengths, input_ids.shape[1], counts, config, rotary, embeds)


def norm(hidden: Float[Tensor, "rows hidden"], module: LlamaRMSNorm) -> Float[Tensor, "rows hidden"]:
    """A norm of the model."""
    return operations_for(hidden).rms_norm(hidden, module.weight, module.variance_epsilon)


def operations_for(x: Float[Tensor, "rows width"]) -> ModuleType:
    """`nsa.ops.step`, or the kernels where they serve."""
    rows = x[:, None, None, :8]  # the width of a row does not matter here, as a head's would
    if resolve(rows, rows) == "triton":
        from nsa.kernels import step as kernels  # only where triton is installed

        if kernels.serves(x):
            return kernels
    return ops


def _inputs(attention: Any) -> list[nn.Linear]:
    if hasattr(attention, "input_projections"):
        return [*attention.input_projections(), attention.g_proj]
    return [attention.q_proj, attention.k_proj, attention.v_proj]


def _is_plain(layer: Any) -> bool:
    attention, mlp = layer.self_attn, layer.mlp
    maps = [*_inputs(attention), attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    return (
        all(map(is_plain, maps))
        and all(isinstance(norm, LlamaRMSNorm) for norm in (layer.input_layernorm, layer.post_attention_layernorm))
        and type(mlp) is LlamaMLP
        and mlp.config.hidden_act == "silu"
        and not mlp.config.mlp_bias
        and len({(p.dtype, p.device) for p in layer.parameters()}) == 1
        and not any(map(is_hooked, layer.modules()))
    )
