"""Llama with NSA: only what differs from transformers' Llama.

attention="nsa" swaps each layer's attention module and the cache. attention="window" keeps Llama's module and adds a
window to its causal mask. attention="dense" is Llama. Weights that Llama has keep their names, so that a Llama
checkpoint loads, with only the new ones reported missing.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, LlamaForCausalLM, LlamaModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    flash_attention_mask,
    prepare_padding_mask,
    sdpa_mask,
    sliding_window_overlay,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel, LlamaRMSNorm, LlamaRotaryEmbedding

from nsa.models.cache import NSALlamaCache
from nsa.models.configuration import NSALlamaConfig
from nsa.models.generation import GenerationPolicy
from nsa.models.step import StepDecoder
from nsa.modules.attention import DecodeStep, Gates, NativeSparseAttention, RotaryFactors, step_padding
from nsa.modules.compression import Compression


def window_mask(*args: Any, config: NSALlamaConfig, mask_function: Any = causal_mask_function, **kwargs: Any) -> Any:
    """transformers' own mask, restricted to the last `window_size` tokens; padding between them does not count."""
    window = sliding_window_overlay(config.nsa_config.window_size)
    padding = prepare_padding_mask(kwargs.get("attention_mask"), kwargs["kv_length"], kwargs.get("kv_offset", 0))
    if padding is not None:
        window = _window_of_tokens(padding.cumsum(-1), config.nsa_config.window_size)
    kwargs["allow_is_causal_skip"] = False
    return sdpa_mask(*args, mask_function=and_masks(mask_function, window), config=config, **kwargs)


def _window_of_tokens(count: Tensor, size: int) -> Any:
    def inner(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return count[row, query] - count[row, key] < size

    return inner


# NSA's module gets the 2-D padding mask as it is; it never calls the attention function registered beside it.
AttentionMaskInterface.register("nsa", flash_attention_mask)
AttentionInterface.register("nsa", sdpa_attention_forward)
AttentionMaskInterface.register("nsa_window", window_mask)
AttentionInterface.register("nsa_window", sdpa_attention_forward)


class NSALlamaAttention(NativeSparseAttention):
    """`NativeSparseAttention` behind the signature of Llama's attention."""

    def __init__(self, config: NSALlamaConfig, layer_idx: int) -> None:
        super().__init__(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config=config.nsa_config,
            rotary=LlamaRotaryEmbedding(config),
            bias=config.attention_bias,
        )
        self.layer_idx = layer_idx

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        cu_seq_lens_q: Tensor | None = None,
        decode_step: DecodeStep | None = None,
        rotary_factors: RotaryFactors | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        cache = None
        if past_key_values is not None:
            if not isinstance(past_key_values, NSALlamaCache):
                got = type(past_key_values).__name__
                raise ValueError(f"attention='nsa' needs an NSALlamaCache as past_key_values, got {got}")
            layer = past_key_values.layers[self.layer_idx]
            cache = layer.nsa
            if decode_step is not None:
                return self.decode(hidden_states, cache.tensors, decode_step), None
        out = super().forward(
            hidden_states, cache=cache, attention_mask=attention_mask, cu_seqlens=cu_seq_lens_q, factors=rotary_factors
        )
        if cache is not None:
            layer.num_columns += hidden_states.shape[1]
        return out, None


class FusedRMSNorm(LlamaRMSNorm):
    """Llama's norm; without gradients in one operation instead of seven, rounded once, and in fp64 where x is."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not torch.is_grad_enabled() and hidden_states.dtype == self.weight.dtype:
            return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)
        return super().forward(hidden_states)


def _has_no_padding(attention_mask: Tensor | None) -> bool:
    return attention_mask is None or bool((attention_mask != 0).all())


def packed_boundaries(position_ids: Tensor) -> Tensor | None:
    """cu_seqlens of packed sequences whose position_ids [1, t] start again from 0; None where they never do."""
    if not (position_ids.diff(dim=-1) < 0).any():
        return None
    if position_ids.shape[0] != 1:
        raise ValueError(f"packed position_ids should come as one row, got {list(position_ids.shape)}")
    starts = (position_ids[0] == 0).nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([position_ids.shape[1]])])


class DenseTwinOnly:
    """A flag of a model class: true of the dense twin, whose attention transformers may replace, and of no other."""

    def __get__(self, model: Any, owner: type) -> bool:
        return model is not None and model.config.attention == "dense"


class NSALlamaPreTrainedModel(LlamaPreTrainedModel):
    config: NSALlamaConfig
    config_class = NSALlamaConfig
    _can_compile_fullgraph = False
    _supports_attention_backend = DenseTwinOnly()
    _supports_flash_attn = DenseTwinOnly()
    _supports_flex_attn = DenseTwinOnly()
    _supports_sdpa = DenseTwinOnly()

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        """The configuration's `attention` decides; for the dense twin transformers may choose its kernel."""
        attention, own = self.config.attention, {"nsa": "nsa", "window": "nsa_window"}
        if attention == "dense" and attn_implementation not in own.values():
            return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)
        if attn_implementation not in (None, own.get(attention)):
            raise ValueError(
                f"attention={attention!r} has its own implementation: expected attn_implementation=None, "
                f"got {attn_implementation!r}"
            )
        return own[attention]

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, device_mesh: Any) -> Any:
        """transformers', where there is a plan."""
        tp_plan = getattr(distributed_config, "tp_plan", None)
        if tp_plan is not None and model.config.attention == "nsa":
            raise ValueError(f"tp_plan={tp_plan!r}: attention='nsa' has no tensor-parallel plan yet; expected None")
        return super().maybe_distribute_model(model, distributed_config, device_mesh)

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Llama's, and: phi starts as the block mean, gates at 1/2."""
        super()._init_weights(module)
        if isinstance(module, Compression):
            if module.kind == "linear":
                mean = torch.eye(module.dim, dtype=module.weight.dtype, device=module.weight.device)
                init.copy_(module.weight, mean.repeat(1, module.block_size) / module.block_size)
            elif module.kind == "mlp":
                init.normal_(module.position_encoding, std=self.config.initializer_range)
                init.zeros_(module.out.weight)
        elif isinstance(module, Gates):
            init.zeros_(module.weight)


class NSALlamaModel(NSALlamaPreTrainedModel, LlamaModel):
    """The decoder without a head."""

    def __init__(self, config: NSALlamaConfig) -> None:
        config.refuse_ignored()
        super().__init__(config)
        for layer_idx, layer in enumerate(self.layers):
            if config.attention == "nsa":
                layer.self_attn = NSALlamaAttention(config, layer_idx)
            layer.input_layernorm = FusedRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            layer.post_attention_layernorm = FusedRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.norm = FusedRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_init()

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
        given = input_ids if inputs_embeds is None else inputs_embeds
        if isinstance(past_key_values, NSALlamaCache) and attention_mask is not None and given is not None:
            past_key_values.check_mask(attention_mask, given.shape[1])
        if self.config.attention == "nsa" and past_key_values is None:
            # A cache that nobody will read costs memory in training; it is made where generation can use it.
            use_cache = not self.training and (self.config.use_cache if use_cache is None else use_cache)
            past_key_values = NSALlamaCache(self.config) if use_cache else None
            # Asked once, not by every layer: the answer waits for the device.
            is_asked = position_ids is not None and kwargs.get("cu_seq_lens_q") is None
            if is_asked and past_key_values is None and _has_no_padding(attention_mask):
                assert position_ids is not None
                kwargs["cu_seq_lens_q"] = packed_boundaries(position_ids)
        if isinstance(past_key_values, NSALlamaCache) and not torch.is_grad_enabled():
            fixed = past_key_values.fixed
            if fixed and given is not None and fixed[0].can_step(given.shape[1]):
                embeds = self.embed_tokens(given) if inputs_embeds is None else given
                return self._forward_step(embeds, attention_mask, past_key_values, use_cache=use_cache, **kwargs)
        if isinstance(past_key_values, NSALlamaCache):
            kwargs["rotary_factors"] = RotaryFactors()
        return super().forward(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

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
        lengths, config = cache.fixed[0].tensors.lengths, self.config.nsa_config
        return DecodeStep.after(lengths, embeds.shape[1], counts, config, self.rotary_emb, embeds)

    def _forward_step(
        self, embeds: Tensor, attention_mask: Tensor | None, cache: NSALlamaCache, **kwargs: Any
    ) -> BaseModelOutputWithPast:
        """`decode` by way of transformers' forward, which records what it is asked to; padding may lie anywhere."""
        b, t, _ = embeds.shape
        counts, order = step_padding(attention_mask, b, t)
        if order is not None:
            embeds = embeds.gather(1, order.unsqueeze(-1).expand_as(embeds))
        cache.make_room(t, some_may_wait=counts is not None)
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


class NSALlamaForCausalLM(GenerationPolicy, NSALlamaPreTrainedModel, LlamaForCausalLM):
    """The language model: save_pretrained, from_pretrained, generate and Trainer as with any Llama."""

    def __init__(self, config: NSALlamaConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)  # what Llama's own does, around another decoder
        self.model = NSALlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        if config.attention == "nsa":
            self._tp_plan: dict[str, str] = {}  # Llama's class has one of the head

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
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        if isinstance(past_key_values, NSALlamaCache) and past_key_values.cuda_graphs:
            is_step = input_ids is not None and input_ids.shape[1] == 1 and bool(past_key_values.fixed)
            # What asks for more than logits goes through the modules.
            more = any(kwargs.get(name) for name in ("output_attentions", "output_hidden_states"))
            more = more or self.config.output_hidden_states or not kwargs.get("return_dict", self.config.return_dict)
            if is_step and labels is None and not more and not torch.is_grad_enabled():
                assert input_ids is not None
                logits = self._decoder(past_key_values, input_ids, attention_mask)(input_ids, attention_mask)
                return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, labels=labels, use_cache=use_cache,
            logits_to_keep=logits_to_keep, **kwargs,
        )  # fmt: skip
