"""Llama with NSA: only what differs from transformers' Llama.

attention="nsa" and "infllm_v2" swap each layer's attention module and the cache. attention="window" keeps Llama's
module and adds a window to its causal mask. attention="dense" is Llama. Weights that Llama has keep their names, so
that a Llama checkpoint loads, with only the new ones reported missing; "infllm_v2" has no new ones.
"""

import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, LlamaForCausalLM, LlamaModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.core_model_loading import WeightRenaming
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.utils import can_return_tuple

from nsa.decode_step import DecodeStep
from nsa.distributed import ContextParallel
from nsa.distributed.layout import ContextLayout
from nsa.distributed.tensor import check_heads, share_phi
from nsa.models.auto_map import write_auto_map
from nsa.models.cache import NSALlamaCache, all_or_nothing
from nsa.models.configuration import SPARSE, NSALlamaConfig
from nsa.models.context import forward_arguments, whole_count
from nsa.models.generation import GenerationPolicy
from nsa.models.loss import ChunkedLoss, lm_loss_of_logits, takes_hidden_states
from nsa.models.positions import check_positions, follow_each_other, packed_boundaries
from nsa.models.step import StepDecoder
from nsa.models.twins import dense_attention, dense_mask, packing, window_attention, window_mask
from nsa.modules.attention import NativeSparseAttention
from nsa.modules.compression import Compression
from nsa.modules.infllm_v2 import InfLLMv2Attention
from nsa.modules.projections import StartingLinear
from nsa.modules.rotary import Rotary, RotaryFactors
from nsa.modules.token_layout import TokenLayout, step_padding

# What a mixin stands before: any class of transformers, or a layer.
Transformers: Any = object

# NSA's module never calls the attention function registered beside it; no mask is made for it.
AttentionInterface.register("nsa", sdpa_attention_forward)
AttentionMaskInterface.register("nsa_dense", dense_mask)
AttentionInterface.register("nsa_dense", dense_attention)
AttentionMaskInterface.register("nsa_window", window_mask)
AttentionInterface.register("nsa_window", window_attention)


class LlamaSignature(Transformers):
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
        if hidden_states.dtype == self.weight.dtype:
            return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)
        return super().forward(hidden_states)


# The gates' map once had the name of the MLP's, and a linear phi was one parameter.
OLD_NAMES = {
    r"self_attn\.gate_proj\.": "self_attn.g_proj.",
    r"compress_k\.weight$": "compress_k.out.weight",
    r"compress_v\.weight$": "compress_v.out.weight",
}


class SomeLayersDense:
    """A flag of a model class: true where transformers may replace the attention of all layers (dense) or some."""

    def __get__(self, model: Any, owner: type) -> bool:
        return model is not None and (model.config.attention == "dense" or bool(model.config.dense_layers))


class SparsePreTrained(Transformers):
    """What a model class of transformers needs to hold NSA's layers; a mixin that stands before that class."""

    _can_compile_fullgraph = False
    _supports_attention_backend = SomeLayersDense()
    _supports_flash_attn = SomeLayersDense()
    _supports_flex_attn = SomeLayersDense()
    _supports_sdpa = SomeLayersDense()

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        """The configuration's `attention` decides; the dense twin takes any of transformers' that is asked for."""
        attention, own = self.config.attention, {"nsa": "nsa", "infllm_v2": "nsa", "window": "nsa_window"}
        if self.config.dense_layers and attn_implementation not in own.values():
            return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)
        if attention == "dense" and attn_implementation not in own.values():
            return super()._check_and_adjust_attn_implementation(attn_implementation or "nsa_dense", *args, **kwargs)
        if attn_implementation not in (None, own.get(attention)):
            raise ValueError(
                f"attention={attention!r} has its own implementation: expected attn_implementation=None, "
                f"got {attn_implementation!r}"
            )
        return own[attention]

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """transformers', with the file by which AutoModel finds this class (trust_remote_code=True)."""
        if kwargs.get("is_main_process", True):
            write_auto_map(self.config, Path(save_directory))
        super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing: transformers would copy this library's source into every folder."""

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, device_mesh: Any) -> Any:
        """transformers', where there is a plan; phi's gradient is then that of the heads of all ranks."""
        tp_plan, ranks = getattr(distributed_config, "tp_plan", None), getattr(distributed_config, "tp_size", None) or 1
        config = model.config
        if tp_plan is not None and config.attention in SPARSE and config.base_model_tp_plan is None:
            raise ValueError(
                f"tp_plan={tp_plan!r}: attention={config.attention!r} of {type(config).__name__} has no "
                "tensor-parallel plan yet; expected None"
            )
        if ranks > 1:
            check_heads(ranks, config.num_key_value_heads)
        model = super().maybe_distribute_model(model, distributed_config, device_mesh)
        if ranks > 1:
            share_phi(model, device_mesh["tp"] if device_mesh.ndim > 1 else device_mesh)
        return model

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Llama's, and: phi starts as the block mean, gates at 1/2."""
        super()._init_weights(module)
        if isinstance(module, Compression) and module.kind == "mlp":
            init.normal_(module.position_encoding, std=self.config.initializer_range)
        elif isinstance(module, StartingLinear):
            init.copy_(module.weight, module.start(module.weight))


class SparseDecoder(Transformers):
    """The forward of a decoder whose layers are NSA's, all or some; a mixin that stands before transformers' class.

    `nsa_config` is the configuration's, made once. Where `context` is set, inputs are one rank's part of sequences that
    several ranks hold (`nsa.distributed`).
    """

    context: ContextParallel | None = None

    @property
    def rotary(self) -> Rotary:
        """cos and sin as NSA's layers take them."""
        return self.rotary_emb

    @all_or_nothing
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        self.config.refuse_attentions(kwargs.get("output_attentions") or self.config.output_attentions)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("NSALlamaModel: give either input_ids or inputs_embeds")
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        is_sparse = self.config.attention in SPARSE
        if self.context is not None:
            refused = {"past_key_values": past_key_values, "attention_mask": attention_mask, "use_cache": use_cache}
            kwargs |= forward_arguments(self, self.context, embeds, position_ids, kwargs, refused)
            return super().forward(inputs_embeds=embeds, use_cache=False, **kwargs)
        packed: dict[str, Any] = {}
        if past_key_values is None:
            packed, attention_mask, use_cache = self._packing(embeds, attention_mask, position_ids, use_cache, kwargs)
            past_key_values = NSALlamaCache(self.config) if use_cache and is_sparse else None
        elif is_sparse and not isinstance(past_key_values, NSALlamaCache):
            got = type(past_key_values).__name__
            raise ValueError(
                f"attention={self.config.attention!r} needs an NSALlamaCache as past_key_values, got {got}"
            )
        elif kwargs.pop("cu_seq_lens_q", None) is not None:
            raise ValueError("NSALlamaModel: cu_seq_lens_q (packed sequences) does not go with past_key_values")
        elif is_sparse:
            if attention_mask is not None:
                past_key_values.check_mask(attention_mask, embeds.shape[1])
            check_positions(position_ids, past_key_values, attention_mask, embeds.shape[1])

        if not is_sparse:
            if packed:
                packed = packing(embeds, position_ids, attention_mask, **packed)
                position_ids = packed.pop("position_ids")
            return super().forward(
                inputs_embeds=embeds, attention_mask=attention_mask, position_ids=position_ids,
                past_key_values=past_key_values, use_cache=use_cache, **packed, **kwargs,
            )  # fmt: skip
        if past_key_values is None:
            kwargs["layout"] = TokenLayout.of(
                embeds, self.rotary, self.nsa_config,
                attention_mask=attention_mask, position_ids=position_ids, **packed,
            )  # fmt: skip
        else:
            if past_key_values.is_step(embeds.shape[1]) and self.can_step():
                return self._forward_step(embeds, attention_mask, past_key_values, use_cache=use_cache, **kwargs)
            kwargs.update(factors=RotaryFactors(self.rotary), token_mask=attention_mask)
        if self.config.dense_layers:  # which take the mask, or the positions of packed sequences, as transformers does
            kwargs["attention_mask"] = attention_mask
            if packed and position_ids is None:
                position_ids = packing(embeds, None, None, **packed)["position_ids"]
        return super().forward(
            inputs_embeds=embeds, position_ids=position_ids, past_key_values=past_key_values, use_cache=use_cache,
            **kwargs,
        )  # fmt: skip

    def can_step(self) -> bool:
        """Whether every layer can take the decoding step made for static and paged caches."""
        return not self.config.dense_layers and all(layer.self_attn.can_step() for layer in self.layers)

    def _packing(
        self, embeds: Tensor, mask: Tensor | None, position_ids: Tensor | None, use_cache: bool | None,
        kwargs: dict[str, Any],
    ) -> tuple[dict[str, Any], Tensor | None, bool]:  # fmt: skip
        """cu_seqlens and max_seqlen of packed sequences, the mask without them, and whether this forward makes a cache.

        A cache that nobody will read costs memory in training; it is made where generation can use it, and where its
        lengths say the positions.
        """
        cu_seqlens: Tensor | None = kwargs.pop("cu_seq_lens_q", None)
        max_seqlen: int | None = kwargs.pop("max_length_q", None)
        for name in ("cu_seq_lens_k", "max_length_k"):
            kwargs.pop(name, None)
        if cu_seqlens is None and position_ids is not None and (mask is None or mask.dim() == 2):
            cu_seqlens, max_seqlen = packed_boundaries(position_ids, mask, *embeds.shape[:2])
            mask = mask if cu_seqlens is None else None
        wanted = not self.training and (self.config.use_cache if use_cache is None else use_cache)
        counted = not wanted or self.config.attention not in SPARSE  # transformers' caches hold any positions
        plain = cu_seqlens is None and (counted or follow_each_other(position_ids, mask))
        if use_cache and wanted and not plain:
            what = "packed sequences" if cu_seqlens is not None else "position_ids that do not count from 0"
            raise ValueError(f"NSALlamaModel: {what} leave no cache behind; expected use_cache=False")
        packed = {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
        return packed, mask, wanted and plain

    def decode(
        self,
        input_ids: Tensor,
        cache: NSALlamaCache,
        counts: Tensor | None,
        decoder: StepDecoder | None = None,
    ) -> Tensor:
        """Hidden states of a decoding step: all of it on the device, at fixed addresses; `make_room` was called.

        Args:
            input_ids: [rows, t].
            cache: static or paged; the tokens are appended.
            counts: int32 [rows], how many of the t columns are tokens, the last ones of each row; None where all are.
            decoder: of this model, in whose place its modules do the same.
        """
        if decoder is not None:
            return decoder(input_ids, [layer.tensors for layer in cache.fixed], counts)
        hidden = self.embed_tokens(input_ids)
        step = self._step(hidden, cache, counts)
        for layer in self.layers:
            hidden = layer(hidden, past_key_values=cache, decode_step=step)
        return self.norm(hidden)

    def _step(self, embeds: Tensor, cache: NSALlamaCache, counts: Tensor | None) -> DecodeStep:
        """What the layers share, made once for all of them."""
        lengths, config = cache.fixed[0].tensors.lengths, self.nsa_config
        return DecodeStep.after(lengths, embeds.shape[1], counts, config, self.rotary, embeds)

    def _forward_step(
        self, embeds: Tensor, attention_mask: Tensor | None, cache: NSALlamaCache, **kwargs: Any
    ) -> BaseModelOutputWithPast:
        """`decode` by way of transformers' forward, which records what it is asked to; padding may lie anywhere."""
        b, t, _ = embeds.shape
        counts, order = step_padding(attention_mask, b, t)
        if order is not None:
            embeds = embeds.gather(1, order.unsqueeze(-1).expand_as(embeds))
        cache.make_room(t, counts)
        step = self._step(embeds, cache, counts)
        return_dict = kwargs.pop("return_dict", None)
        out = super().forward(
            inputs_embeds=embeds, position_ids=torch.zeros_like(embeds[:1, :, 0], dtype=torch.long),
            past_key_values=cache, decode_step=step, return_dict=True, **kwargs,
        )  # fmt: skip
        if order is not None:
            out.last_hidden_state = _unsorted(out.last_hidden_state, order)
            if out.hidden_states is not None:
                out.hidden_states = tuple(_unsorted(hidden, order) for hidden in out.hidden_states)
        return out if return_dict or (return_dict is None and self.config.return_dict) else out.to_tuple()


def _unsorted(hidden: Tensor, order: Tensor) -> Tensor:
    """Columns back where they were before `order` sorted them."""
    return torch.empty_like(hidden).scatter(1, order.unsqueeze(-1).expand_as(hidden), hidden)


class NSALlamaPreTrainedModel(SparsePreTrained, LlamaPreTrainedModel):
    config: NSALlamaConfig
    config_class = NSALlamaConfig

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """transformers' own; folders that an earlier version wrote load too, and are saved under the new names."""
        loaded = super().from_pretrained(*args, **{"key_mapping": OLD_NAMES, **kwargs})
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        kept = [one for one in getattr(model, "_weight_conversions", None) or () if not isinstance(one, WeightRenaming)]
        model._weight_conversions = kept or None
        return loaded


class NSALlamaModel(SparseDecoder, NSALlamaPreTrainedModel, LlamaModel):
    """The decoder without a head."""

    def __init__(self, config: NSALlamaConfig) -> None:
        config.refuse_ignored()
        super().__init__(config)
        self.nsa_config = config.nsa_config
        sparse = config.sparse_layers
        for layer_idx, layer in enumerate(self.layers):
            if layer_idx in sparse:
                layer.self_attn = LAYERS[config.attention](config, layer_idx, layer.self_attn)
            layer.input_layernorm = FusedRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            layer.post_attention_layernorm = FusedRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.norm = FusedRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_init()


class SparseCausalLM(GenerationPolicy):
    """generate() and the loss of a language model whose decoder is a `SparseDecoder`; a mixin like it."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        weights: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Llama's, and:

        * In training, with labels, `logits` are None: the loss takes hidden states, some tokens at a time
          (`nsa.models.loss`), so that the logits of a large vocabulary are never all in memory.
        * `weights` [b, t] say how much each label counts in the loss.
        """
        if isinstance(past_key_values, NSALlamaCache) and past_key_values.cuda_graphs:
            is_step = input_ids is not None and input_ids.shape[1] == 1 and past_key_values.is_step(1)
            # What asks for more than logits goes through the modules.
            more = any(kwargs.get(name) for name in ("output_attentions", "output_hidden_states"))
            more = more or self.config.output_hidden_states or not kwargs.get("return_dict", self.config.return_dict)
            if is_step and labels is None and not more:
                assert input_ids is not None
                logits = self._decoder(past_key_values, input_ids, attention_mask)(input_ids, attention_mask)
                return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
        if weights is not None and labels is None:
            raise ValueError("weights: expected labels, which they weigh, beside them; got none")
        forward = super().forward if labels is None else self._forward_with_loss
        extra = {} if labels is None else {"labels": labels, "weights": weights}
        return forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache,
            logits_to_keep=logits_to_keep, **extra, **kwargs,
        )  # fmt: skip

    @can_return_tuple
    def _forward_with_loss(
        self, labels: Tensor, weights: Tensor | None, logits_to_keep: int | Tensor, **kwargs: Any
    ) -> CausalLMOutputWithPast:
        if self.model.context is not None:
            kwargs["num_items_in_batch"] = whole_count(self.model.context, kwargs)
        of_loss = {name: kwargs[name] for name in ("num_items_in_batch", "shift_labels") if name in kwargs}
        wants_all = isinstance(logits_to_keep, int) and logits_to_keep == 0
        if self.training and wants_all and takes_hidden_states(self, kwargs):
            out, logits = self.model(**kwargs), None
            loss = self.chunked_loss(out.last_hidden_state, self.lm_head.weight, labels, weights=weights, **of_loss)
        elif weights is None:
            return super().forward(labels=labels, logits_to_keep=logits_to_keep, **kwargs)
        else:
            out = super().forward(logits_to_keep=logits_to_keep, **kwargs)
            logits = out.logits
            loss = lm_loss_of_logits(logits, labels, weights=weights, **of_loss)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=out.past_key_values, hidden_states=out.hidden_states,
            attentions=out.attentions,
        )  # fmt: skip


class NSALlamaForCausalLM(SparseCausalLM, NSALlamaPreTrainedModel, LlamaForCausalLM):
    """The language model: save_pretrained, from_pretrained, generate and Trainer as with any Llama."""

    def __init__(self, config: NSALlamaConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)  # what Llama's own does, around another decoder
        self.model = NSALlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.chunked_loss = ChunkedLoss()
        self.post_init()
        if config.attention in SPARSE:
            self._tp_plan.pop("lm_head", None)  # whole on every rank: the loss takes hidden states
