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
    sdpa_mask,
    sliding_window_overlay,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel, LlamaRMSNorm, LlamaRotaryEmbedding

from nsa.backend import resolve, why_not_triton
from nsa.models.cache import Layout, NSALlamaCache
from nsa.models.configuration import NSALlamaConfig
from nsa.models.decoding import Decoder
from nsa.models.step import StepDecoder
from nsa.modules.attention import DecodeStep, Gates, NativeSparseAttention, RotaryFactors, step_padding
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
            fixed, given = past_key_values.fixed, input_ids if inputs_embeds is None else inputs_embeds
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
        out = super().forward(
            inputs_embeds=embeds, position_ids=torch.zeros_like(embeds[:1, :, 0], dtype=torch.long),
            past_key_values=cache, decode_step=step, **kwargs,
        )  # fmt: skip
        if order is not None:
            hidden = out.last_hidden_state
            out.last_hidden_state = torch.empty_like(hidden).scatter(1, order.unsqueeze(-1).expand_as(hidden), hidden)
        return out


class NSALlamaForCausalLM(NSALlamaPreTrainedModel, LlamaForCausalLM):
    """The language model: save_pretrained, from_pretrained, generate and Trainer as with any Llama."""

    def __init__(self, config: NSALlamaConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)  # what Llama's own does, around another decoder
        self.model = NSALlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        self._cuda_graphs_asked: bool | None = None
        self.decode_path = "nothing was generated yet"

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
            if is_step and labels is None and not torch.is_grad_enabled():
                assert input_ids is not None
                logits = self._decoder(past_key_values, input_ids, attention_mask)(input_ids, attention_mask)
                return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, labels=labels, use_cache=use_cache,
            logits_to_keep=logits_to_keep, **kwargs,
        )  # fmt: skip

    def _decoder(self, cache: NSALlamaCache, input_ids: Tensor, attention_mask: Tensor | None) -> Decoder:
        """The cache's own, as long as it serves."""
        decoder: Decoder | None = cache.decoder
        if decoder is None or decoder.model is not self or not decoder.serves(input_ids, attention_mask):
            decoder = Decoder(self, cache, masked=attention_mask is not None)
            cache.decoder = decoder
        return decoder

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *args: Any, cuda_graphs: bool | None = None, **kwargs: Any) -> Any:
        """transformers' generate, and:

        * On a CUDA GPU with attention="nsa" the cache is static (paged with beams) and decoding steps are CUDA graphs,
          captured once for each cache and replayed. `cuda_graphs=False` goes without, and `cuda_graphs=True` makes it
          an error, in one line, where they cannot be. By default they are left out in these cases, and
          `model.decode_path` says afterwards which it was:
          not on a CUDA device; a growing cache (asked for, or because a static one would not fit into the free
          memory); attentions or hidden states are to be returned; the model is an assistant; a rotary embedding that
          changes with the length; a model spread over devices; sizes that the kernels do not take.
        * `cache_implementation` is "static" or "dynamic" (growing); or give an `NSALlamaCache` as past_key_values.
        * `prefill_chunk_size` bounds the memory of a long prompt.
        * Right-padded prompts become left-padded ones first, so that each row continues after its own last token.
        """
        input_ids, mask = kwargs.get("input_ids", inputs), kwargs.get("attention_mask")
        if input_ids is not None and mask is not None and mask.shape == input_ids.shape:
            order = (mask != 0).to(torch.int8).argsort(dim=1, stable=True)
            kwargs["attention_mask"] = mask.gather(1, order)
            kwargs["input_ids" if "input_ids" in kwargs else "inputs"] = input_ids.gather(1, order)
            inputs = None if "input_ids" in kwargs else kwargs.pop("inputs")
        self._cuda_graphs_asked = cuda_graphs
        return super().generate(inputs, *args, **kwargs)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, batch_size: int,
        max_cache_length: int, *args: Any,
    ) -> None:  # fmt: skip
        if self.config.attention != "nsa" or generation_config.use_cache is False:
            is_nsa = self.config.attention == "nsa"
            self._say_how("use_cache=False" if is_nsa else f"attention={self.config.attention!r}")
            super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length, *args
            )
            return
        reason = self._why_no_cuda_graph(generation_config)
        cache = model_kwargs.get("past_key_values")
        if cache is None:
            rows = batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
            cache, refusal = self._new_cache(generation_config, rows, max_cache_length, graphs=reason is None)
            reason = reason or refusal
            model_kwargs["past_key_values"] = cache
        else:
            super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length, *args
            )
            if getattr(cache, "layout", "growing") == "growing":
                reason = reason or "the cache grows"
        self._say_how(reason)
        if isinstance(cache, NSALlamaCache):
            cache.cuda_graphs = reason is None

    def _say_how(self, reason: str | None) -> None:
        if reason is not None and self._cuda_graphs_asked:
            raise ValueError(f"generate(cuda_graphs=True) cannot be: {reason}")
        self.decode_path = "CUDA graphs" if reason is None else f"no CUDA graphs: {reason}"

    def _new_cache(
        self, generation_config: Any, rows: int, max_length: int, *, graphs: bool
    ) -> tuple[NSALlamaCache, str | None]:
        """A cache of the layout that was asked for, or that suits; and why it is no cache for CUDA graphs."""
        kind = generation_config.cache_implementation
        if kind not in (None, "static", "dynamic"):
            raise ValueError(
                f"attention='nsa' has its own caches; expected cache_implementation 'static' or 'dynamic', got {kind!r}"
            )
        layout: Layout = "growing"
        if kind == "static" or (kind is None and graphs):
            layout = "paged" if (generation_config.num_beams or 1) > 1 and kind is None else "static"
        if layout == "growing":
            return NSALlamaCache(self.config), "the cache grows"
        max_new, page_size = 16, 256
        max_length += max_new  # assisted decoding tries tokens past the end
        page_size = -(-page_size // self.config.nsa_config.select_block_size) * self.config.nsa_config.select_block_size
        pages = rows * -(-max_length // page_size)
        wanted = pages * page_size * self.cache_bytes_per_token()
        free = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else wanted
        if kind is None and wanted > free:
            gib = 2**30
            reason = f"a static cache of {wanted / gib:.1f} GiB does not fit into {free / gib:.1f} GiB"
            return NSALlamaCache(self.config), reason
        sizes: dict[str, Any] = {"num_pages": pages, "page_size": page_size} if layout == "paged" else {}
        return NSALlamaCache(self.config, layout=layout, max_length=max_length, max_new=max_new, **sizes), None

    def cache_bytes_per_token(self) -> float:
        """Bytes that a long sequence adds to the cache with each token, all layers together."""
        return sum(layer.self_attn.cache_bytes_per_token() for layer in self.model.layers)

    def _why_no_cuda_graph(self, generation_config: Any) -> str | None:
        if self._cuda_graphs_asked is False:
            return "cuda_graphs=False"
        if self.device.type != "cuda":
            return f"the model is on {self.device}"
        if len(set(getattr(self, "hf_device_map", {}).values())) > 1:
            return "the model is spread over devices"
        if generation_config.output_attentions or generation_config.output_hidden_states:
            return "attentions or hidden states are to be returned"
        if generation_config.is_assistant:
            return "an assistant's cache is used again, for longer texts"
        rope = self.model.rotary_emb.rope_type
        if rope in ("dynamic", "longrope"):
            return f"rotary embeddings of type {rope!r} change with the length"
        config = self.config
        q, k = (
            torch.empty(1, 1, heads, config.head_dim, dtype=self.dtype, device=self.device)
            for heads in (config.num_attention_heads, config.num_key_value_heads)
        )
        if resolve(q, k) == "torch":
            return f"PyTorch operations decode: {why_not_triton(q, k) or 'the backend asked for'}"
        return None
