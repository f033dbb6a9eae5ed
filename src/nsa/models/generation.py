"""How `generate()` runs: which cache it makes, whether decoding steps are CUDA graphs, how prompts are padded."""

from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerationMixin

from nsa.backend import resolve, why_not_triton
from nsa.models.cache import Layout, NSALlamaCache
from nsa.models.configuration import NSALlamaConfig
from nsa.models.decoding import Decoder


class GenerationPolicy(GenerationMixin):
    """transformers' generate() for a model that may have NSA's caches."""

    config: NSALlamaConfig
    model: Any
    _cuda_graphs_asked: bool | None = None
    decode_path = "nothing was generated yet"

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
