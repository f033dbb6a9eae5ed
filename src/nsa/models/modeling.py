"""Llama with NSA: only what differs from transformers' Llama.

attention="nsa" swaps each layer's attention module and the cache. attention="window" keeps Llama's module and adds a
window to its causal mask. attention="dense" is Llama. Weights that Llama has keep their names, so that a Llama
checkpoint loads, with only the new ones reported missing.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, LlamaForCausalLM, LlamaModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    flash_attention_mask,
    sdpa_mask,
    sliding_window_overlay,
)
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel, LlamaRotaryEmbedding

from nsa.models.cache import NSALlamaCache
from nsa.models.configuration import NSALlamaConfig
from nsa.modules.attention import Gates, NativeSparseAttention
from nsa.modules.compression import Compression


def window_mask(*args: Any, config: NSALlamaConfig, mask_function: Any = causal_mask_function, **kwargs: Any) -> Any:
    """transformers' own mask, restricted to the last `window_size` keys."""
    window = sliding_window_overlay(config.nsa_config.window_size)
    kwargs["allow_is_causal_skip"] = False
    return sdpa_mask(*args, mask_function=and_masks(mask_function, window), config=config, **kwargs)


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
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        cache = None
        if past_key_values is not None:
            if not isinstance(past_key_values, NSALlamaCache):
                got = type(past_key_values).__name__
                raise ValueError(f"attention='nsa' needs an NSALlamaCache as past_key_values, got {got}")
            layer = past_key_values.layers[self.layer_idx]
            layer.num_columns += hidden_states.shape[1]
            cache = layer.nsa
        out = super().forward(hidden_states, cache=cache, attention_mask=attention_mask, cu_seqlens=cu_seq_lens_q)
        return out, None


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


class NSALlamaPreTrainedModel(LlamaPreTrainedModel):
    config: NSALlamaConfig
    config_class = NSALlamaConfig
    _can_compile_fullgraph = False

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        """The configuration's `attention` decides; for the dense twin transformers may choose its kernel."""
        if self.config.attention == "dense":
            return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)
        return {"nsa": "nsa", "window": "nsa_window"}[self.config.attention]

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
        super().__init__(config)
        if config.attention == "nsa":
            for layer_idx, layer in enumerate(self.layers):
                layer.self_attn = NSALlamaAttention(config, layer_idx)
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
        if self.config.attention == "nsa" and past_key_values is None:
            # A cache that nobody will read costs memory in training; it is made where generation can use it.
            use_cache = not self.training and (self.config.use_cache if use_cache is None else use_cache)
            past_key_values = NSALlamaCache(self.config) if use_cache else None
            # Asked once, not by every layer: the answer waits for the device.
            is_asked = position_ids is not None and kwargs.get("cu_seq_lens_q") is None
            if is_asked and past_key_values is None and _has_no_padding(attention_mask):
                assert position_ids is not None
                kwargs["cu_seq_lens_q"] = packed_boundaries(position_ids)
        return super().forward(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )


class NSALlamaForCausalLM(NSALlamaPreTrainedModel, LlamaForCausalLM):
    """The language model: save_pretrained, from_pretrained, generate and Trainer as with any Llama."""

    def __init__(self, config: NSALlamaConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)  # what Llama's own does, around another decoder
        self.model = NSALlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """transformers' generate; right-padded prompts become left-padded ones first, so that each row continues
        after its own last token."""
        input_ids, mask = kwargs.get("input_ids", inputs), kwargs.get("attention_mask")
        if input_ids is not None and mask is not None and mask.shape == input_ids.shape:
            order = (mask != 0).to(torch.int8).argsort(dim=1, stable=True)
            kwargs["attention_mask"] = mask.gather(1, order)
            kwargs["input_ids" if "input_ids" in kwargs else "inputs"] = input_ids.gather(1, order)
            inputs = None if "input_ids" in kwargs else kwargs.pop("inputs")
        return super().generate(inputs, *args, **kwargs)

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> None:
        if self.config.attention == "nsa" and model_kwargs.get("past_key_values") is None:
            if generation_config.cache_implementation is not None:
                kind = generation_config.cache_implementation
                raise ValueError(f"attention='nsa' has its own cache; expected no cache_implementation, got {kind!r}")
            if generation_config.use_cache is not False:
                model_kwargs["past_key_values"] = NSALlamaCache(self.config)
            return
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
