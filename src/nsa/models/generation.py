"""How `generate()` runs: which cache it makes, whether decoding steps are CUDA graphs, how prompts are padded."""

import copy
import math
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerationMixin

from nsa.backend import resolve, why_not_triton
from nsa.models.cache import Layout, NSALlamaCache, dense_layer
from nsa.models.configuration import SPARSE, NSALlamaConfig
from nsa.models.positions import follow_each_other


class GenerationPolicy(GenerationMixin):
    """transformers' generate() for a model that may have NSA's caches."""

    config: NSALlamaConfig
    model: Any
    decode_path = "nothing was generated yet"
    _cuda_graphs_asked: bool | None = None
    _moved_mask: Tensor | None = None  # of the prompt of this generate(), where its padding was moved
    _candidates = 0  # tokens that a step of this generate() may try and take back: `most_candidates`

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *args: Any, cuda_graphs: bool | None = None, **kwargs: Any) -> Any:
        """transformers' generate, and:

        * On a CUDA GPU with attention="nsa" the cache is static (paged with beams) and decoding steps are CUDA graphs,
          captured once for each cache and replayed. `cuda_graphs=False` goes without, and `cuda_graphs=True` makes it
          an error, in one line, where they cannot be. By default they are left out in these cases, and
          `model.decode_path` says afterwards which it was:
          not on a CUDA device; a growing cache (asked for, or because a static one would not fit into the free
          memory); hidden states are to be returned; the model is an assistant; layers that stay dense; capped
          logits; adapters, hooks or quantized weights in phi; a rotary embedding that changes with the length; a model
          spread over devices; sizes that the kernels do not take.
        * `cache_implementation` is "static" or "dynamic" (growing); or give an `NSALlamaCache` as past_key_values.
        * A filled cache is gone on from: give whole sequences, as transformers wants them, or the new tokens with an
          attention_mask of all columns. A mask may not hide what is cached.
        * `prefill_chunk_size` bounds the memory of a long prompt, of embeddings and after a filled cache too.
        * Rows that end in padding get it in front first (in a later turn: in front of its new columns), so that each
          continues after its own last token. The sequences returned have it there, and so must the next turn's mask.
        * Continuous batching is refused: transformers' pages know nothing of NSA or a window, nor these twins of them.
        """
        self._cuda_graphs_asked, self._moved_mask = cuda_graphs, None
        if self.config.attention in SPARSE and not follow_each_other(
            kwargs.get("position_ids"), kwargs.get("attention_mask")
        ):
            raise ValueError(
                f"generate(): attention={self.config.attention!r} counts positions from 0 by itself; "
                "leave position_ids out"
            )
        given = kwargs.get("generation_config", args[0] if args else None)
        if "paged" in (kwargs.get("cache_implementation"), getattr(given, "cache_implementation", None)):
            raise _no_continuous_batching("cache_implementation='paged'")
        return super().generate(inputs, *args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refused, and so is `transformers serve --continuous-batching`."""
        raise _no_continuous_batching("init_continuous_batching()")

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: transformers' continuous batching."""
        raise _no_continuous_batching("generate_batch()")

    # ---- prompts ------------------------------------------------------------------------------------------

    def _prepare_model_inputs(self, *args: Any, **kwargs: Any) -> tuple[Tensor, str | None, dict[str, Any]]:
        """transformers', where a given mask is known: before it would warn of padding on the right."""
        inputs, name, model_kwargs = super()._prepare_model_inputs(*args, **kwargs)
        if name == "input_ids":
            inputs, model_kwargs = self._padded_left(inputs, model_kwargs)
        return inputs, name, model_kwargs

    def _expand_inputs_for_generation(self, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Any]]:
        """transformers', where a mask without one given, and embeddings, are known too."""
        input_ids, model_kwargs = super()._expand_inputs_for_generation(*args, **kwargs)
        return self._padded_left(input_ids, model_kwargs)

    def _padded_left(self, input_ids: Tensor, model_kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        mask, cache = model_kwargs.get("attention_mask"), model_kwargs.get("past_key_values")
        if mask is None or mask.dim() != 2:
            return input_ids, model_kwargs
        past = 0 if cache is None else int(cache.get_seq_length())
        self._check_prompt(input_ids, model_kwargs.get("inputs_embeds"), mask, past)
        if isinstance(cache, NSALlamaCache):
            cache.check_mask(mask, mask.shape[1] - past)
        else:
            _check_moved(cache, mask)
        input_ids, model_kwargs = left_padded(input_ids, model_kwargs, past)
        if model_kwargs["attention_mask"] is not mask:
            self._moved_mask = model_kwargs["attention_mask"]
        return input_ids, model_kwargs

    def _check_prompt(self, input_ids: Tensor, embeds: Tensor | None, mask: Tensor, past: int) -> None:
        if embeds is not None and self._candidates:
            raise ValueError("generate(): candidates (an assistant, prompt lookup) need input_ids, got inputs_embeds")
        given = input_ids if embeds is None else embeds
        is_all = given.shape[1] == mask.shape[1] > past
        # What looks tokens up, or has embeddings, is given all of them by transformers.
        is_new = given.shape[1] == mask.shape[1] - past and not self._candidates and embeds is None
        if len(given) != len(mask) or not (is_all or is_new):
            kinds = "whole sequences" if self._candidates or embeds is not None else "whole sequences or new tokens"
            raise ValueError(
                f"generate(): expected {kinds} after {past} cached columns, and an attention_mask [rows, all columns]; "
                f"got {list(given.shape)} and attention_mask {list(mask.shape)}"
            )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """transformers'; whole sequences lose the columns that are cached, in a first step with candidates too."""
        is_whole = attention_mask is not None and attention_mask.shape[1] == input_ids.shape[1]
        if is_first_iteration and next_sequence_length is None and past_key_values is not None and is_whole:
            next_sequence_length = input_ids.shape[1] - int(past_key_values.get_seq_length())
        inputs = super().prepare_inputs_for_generation(
            input_ids, next_sequence_length=next_sequence_length, past_key_values=past_key_values,
            attention_mask=attention_mask, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs,
        )  # fmt: skip
        if isinstance(past_key_values, NSALlamaCache) and not self.config.dense_layers:
            inputs.pop("position_ids", None)  # the cache counts them itself; comparing would wait for the device
        return inputs

    def _prefill(
        self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], is_first_iteration: bool = True
    ) -> Any:
        """transformers'; with `prefill_chunk_size` all columns that are not cached but the last chunk go before it."""
        chunk, cache = generation_config.prefill_chunk_size, model_kwargs.get("past_key_values")
        mask, embeds = model_kwargs.get("attention_mask"), model_kwargs.get("inputs_embeds")
        embeds = embeds if is_first_iteration else None
        if chunk is None or cache is None or mask is None:
            return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)
        name = "input_ids" if embeds is None else "inputs_embeds"
        given, positions = input_ids if embeds is None else embeds, model_kwargs.get("position_ids")
        columns = mask.shape[1]
        first_given = columns - given.shape[1]
        while columns - (past := int(cache.get_seq_length())) > chunk:
            end = past + chunk
            inputs = {name: given[:, past - first_given : end - first_given], "attention_mask": mask[:, :end]}
            if positions is not None:
                inputs["position_ids"] = positions[:, past:end]
            inputs = {name: x.to(self.device) for name, x in inputs.items()}
            self(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        generation_config = copy.copy(generation_config)
        generation_config.prefill_chunk_size = None
        rest = input_ids[:, max(0, past - first_given) :] if embeds is None else input_ids
        return super()._prefill(rest, generation_config, model_kwargs, is_first_iteration)

    # ---- caches -------------------------------------------------------------------------------------------

    def _validate_generation_mode(self, mode: Any, generation_config: Any, mode_kwargs: dict[str, Any]) -> None:
        """transformers', where the way to decode and the assistant are known."""
        super()._validate_generation_mode(mode, generation_config, mode_kwargs)
        self._candidates = most_candidates(self, generation_config, mode_kwargs)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, batch_size: int,
        max_cache_length: int, *args: Any,
    ) -> None:  # fmt: skip
        if self.config.attention not in SPARSE or generation_config.use_cache is False:
            is_sparse = self.config.attention in SPARSE
            self._say_how("use_cache=False" if is_sparse else f"attention={self.config.attention!r}")
            super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length, *args
            )
            if self._moved_mask is not None and model_kwargs.get("past_key_values") is not None:
                model_kwargs["past_key_values"].moved_mask = self._moved_mask
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
            self._check_crop(cache)
        self._say_how(reason)
        if isinstance(cache, NSALlamaCache):
            cache.cuda_graphs = reason is None

    def _check_crop(self, cache: Any) -> None:
        if isinstance(cache, NSALlamaCache) and cache.caches[0].max_crop < self._candidates:
            raise ValueError(
                f"past_key_values: max_crop={cache.caches[0].max_crop} tokens can be taken back, expected at least "
                f"{self._candidates} for as many candidates"
            )

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
                f"attention={self.config.attention!r} has its own caches; expected cache_implementation 'static' or "
                f"'dynamic', got {kind!r}"
            )
        layout: Layout = "growing"
        if kind == "static" and self.config.dense_layers:
            raise ValueError("cache_implementation='static': layers that stay dense need the growing cache, 'dynamic'")
        if kind == "static" or (kind is None and graphs):
            layout = "paged" if (generation_config.num_beams or 1) > 1 and kind is None else "static"
        max_new, page_size, max_crop = 16, 256, max(64, self._candidates)
        if layout == "growing":
            return NSALlamaCache(self.config, max_crop=max_crop), "the cache grows"
        max_length = max(max_length, getattr(generation_config, "max_cache_len", None) or 0)
        max_length += max(max_new, self._candidates)  # which may go past the end
        page_size = -(-page_size // self.config.nsa_config.select_block_size) * self.config.nsa_config.select_block_size
        pages = rows * -(-max_length // page_size)
        wanted = pages * page_size * self.cache_bytes_per_token()
        free = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else wanted
        if kind is None and wanted > free:
            gib = 2**30
            reason = f"a static cache of {wanted / gib:.1f} GiB does not fit into {free / gib:.1f} GiB"
            return NSALlamaCache(self.config, max_crop=max_crop), reason
        sizes: dict[str, Any] = {"num_pages": pages, "page_size": page_size} if layout == "paged" else {}
        cache = NSALlamaCache(
            self.config, layout=layout, max_length=max_length, max_crop=max_crop, max_new=max_new, **sizes
        )
        return cache, None

    def cache_bytes_per_token(self) -> float:
        """Bytes that a long sequence adds to the cache with each token, all layers together."""
        layers, kept = self.model.layers, self.config.dense_layers or ()
        pair = 2 * self.config.num_key_value_heads * self.config.head_dim * self.dtype.itemsize
        dense = sum(pair for number in kept if not dense_layer(self.config, number).is_sliding)
        return dense + sum(layers[number].self_attn.cache_bytes_per_token() for number in self.config.sparse_layers)

    def _why_no_cuda_graph(self, generation_config: Any) -> str | None:
        if self._cuda_graphs_asked is False:
            return "cuda_graphs=False"
        if self.device.type != "cuda":
            return f"the model is on {self.device}"
        if len(set(getattr(self, "hf_device_map", {}).values())) > 1:
            return "the model is spread over devices"
        if generation_config.output_hidden_states:
            return "hidden states are to be returned"
        if generation_config.is_assistant:
            return "an assistant's cache is used again, for longer texts"
        if self.config.dense_layers:
            return "some layers stay dense"
        if getattr(self.config, "final_logit_softcapping", None):
            return "logits are capped"
        if self.config.attention != "nsa":
            return f"attention={self.config.attention!r} has no step that the device takes alone"
        if not self.model.can_step():
            return "phi is more than its weights (adapters, hooks, quantized)"
        rope = self.model.rotary_emb.rope_type  # of each kind of layer, where these differ
        rope = rope["full_attention"] if isinstance(rope, dict) else rope
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


def _no_continuous_batching(name: str) -> ValueError:
    return ValueError(f"{name}: continuous batching is not served by this model and its twins; expected generate()")


def _check_moved(cache: Any, mask: Tensor) -> None:
    """ValueError where a mask shows padding that an earlier generate() over this cache moved to the front."""
    moved = getattr(cache, "moved_mask", None)
    if moved is None or len(moved) != len(mask) or not cache.get_seq_length():
        return
    columns = min(moved.shape[1], mask.shape[1])
    if ((mask[:, :columns] != 0) & (moved[:, :columns] == 0)).any():
        raise ValueError(
            "attention_mask shows padding of the cache, which generate() moved to the front; expected the mask of the "
            "sequences that it returned"
        )


def left_padded(input_ids: Tensor, model_kwargs: dict[str, Any], past: int) -> tuple[Tensor, dict[str, Any]]:
    """Prompts that end in tokens: of other rows, padding among the columns from `past` on goes to the front of these.

    Args:
        input_ids: [rows, all columns or those from past on], or fewer beside inputs_embeds.
        model_kwargs: with attention_mask [rows, all columns]; position_ids and inputs_embeds move with it.
    """
    mask = model_kwargs["attention_mask"]
    new = mask.shape[1] - past
    is_token = mask[:, past:] != 0
    stays = is_token[:, -1:]
    if stays.all():
        return input_ids, model_kwargs
    order = (is_token | stays).to(torch.int8).argsort(dim=1, stable=True)

    def moved(x: Tensor) -> Tensor:
        x = x.expand(len(order), *x.shape[1:])
        index = order.reshape(*order.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
        before = x.shape[1] - new
        return torch.cat([x[:, :before], x[:, before:].gather(1, index.to(x.device))], dim=1)

    names = ("attention_mask", "position_ids", "inputs_embeds")
    moving = {name: moved(model_kwargs[name]) for name in names if model_kwargs.get(name) is not None}
    return moved(input_ids) if input_ids.shape[1] >= new else input_ids, {**model_kwargs, **moving}


def most_candidates(model: Any, generation_config: Any, mode_kwargs: dict[str, Any]) -> int:
    """Tokens that a step of speculative decoding may try, and so take back; 0 where there is no such step."""
    inherited = getattr(generation_config, "max_candidates", None)
    if inherited is not None:  # of an assistant's cache as many are taken back as of the model's
        return inherited
    assistant = mode_kwargs.get("assistant_model")
    if generation_config.assistant_early_exit is not None:
        assistant = model
    if generation_config.prompt_lookup_num_tokens is not None:
        count = generation_config.prompt_lookup_num_tokens
    elif assistant is not None:
        config, new = assistant.generation_config, generation_config.max_new_tokens or generation_config.max_length
        count = config.num_assistant_tokens or 20
        if "heuristic" in (config.num_assistant_tokens_schedule or ""):
            # Two more after each step that was all right: the r-th such step gave at least 2 r tokens.
            count += 2 * math.isqrt(new or 20) + 2
        if "assistant_tokenizer" in mode_kwargs:
            count *= 8  # a token of the assistant's may be several of the model's
    else:
        return 0
    generation_config.max_candidates = count + 2
    return count + 2
