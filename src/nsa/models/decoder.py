"""The forward of a decoder with NSA's layers: whole sequences, packed ones, parts of them, with a cache, a step."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from nsa.decode_step import DecodeStep
from nsa.distributed import ContextParallel
from nsa.methods.registry import TRAINED
from nsa.models.cache import NSALlamaCache, all_or_nothing
from nsa.models.configuration import SPARSE
from nsa.models.context import forward_arguments
from nsa.models.positions import check_positions, follow_each_other, given_boundaries, packed_boundaries
from nsa.models.twins import packing
from nsa.modules.rotary import Rotary, RotaryFactors
from nsa.modules.token_layout import TokenLayout, in_order, out_of_order, step_padding

# What a mixin stands before: a decoder of transformers.
Transformers: Any = object


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
        else:
            self._check_cache(past_key_values, attention_mask, position_ids, embeds.shape[1], kwargs)
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
        if self.config.dense_layers:  # whose attention is told of padding and packed sequences too
            kwargs["attention_mask"] = attention_mask
            if packed:
                names = packing(embeds, position_ids, None, **packed)
                position_ids = names.pop("position_ids")
                kwargs |= names if self.config._attn_implementation == TRAINED["dense"].implementation else {}
        return super().forward(
            inputs_embeds=embeds, position_ids=position_ids, past_key_values=past_key_values, use_cache=use_cache,
            **kwargs,
        )  # fmt: skip

    def _check_cache(
        self, cache: Cache, mask: Tensor | None, position_ids: Tensor | None, columns: int, kwargs: dict[str, Any]
    ) -> None:
        """ValueError where so many new columns cannot go on from the cache, in one line."""
        is_sparse = self.config.attention in SPARSE
        if is_sparse and not isinstance(cache, NSALlamaCache):
            got = type(cache).__name__
            raise ValueError(
                f"attention={self.config.attention!r} needs an NSALlamaCache as past_key_values, got {got}"
            )
        if kwargs.pop("cu_seq_lens_q", None) is not None:
            raise ValueError("NSALlamaModel: cu_seq_lens_q (packed sequences) does not go with past_key_values")
        if is_sparse:
            if mask is not None:
                cache.check_mask(mask, columns)
            check_positions(position_ids, cache, mask, columns)

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
        cu_seqlens, max_seqlen = given_boundaries(kwargs)
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

    def decode(self, input_ids: Tensor, cache: NSALlamaCache, counts: Tensor | None) -> Tensor:
        """Hidden states of a decoding step: all of it on the device, at fixed addresses; `make_room` was called.

        Args:
            input_ids: [rows, t].
            cache: static or paged; the tokens are appended.
            counts: int32 [rows], how many of the t columns are tokens, the last ones of each row; None where all are.
        """
        hidden = self.embed_tokens(input_ids)
        step = self._shared_by_layers(hidden, cache, counts)
        for layer in self.layers:
            hidden = layer(hidden, past_key_values=cache, decode_step=step)
        return self.norm(hidden)

    def _shared_by_layers(self, embeds: Tensor, cache: NSALlamaCache, counts: Tensor | None) -> DecodeStep:
        """What the layers of a decoding step share, made once for all of them."""
        lengths, config = cache.fixed[0].tensors.lengths, self.nsa_config
        return DecodeStep.after(lengths, embeds.shape[1], counts, config, self.rotary, embeds)

    def _forward_step(
        self, embeds: Tensor, attention_mask: Tensor | None, cache: NSALlamaCache, **kwargs: Any
    ) -> BaseModelOutputWithPast:
        """`decode` by way of transformers' forward, which records what it is asked to; padding may lie anywhere."""
        b, t, _ = embeds.shape
        counts, order = step_padding(attention_mask, b, t)
        embeds = in_order(embeds, order)
        cache.make_room(t, counts)
        step = self._shared_by_layers(embeds, cache, counts)
        return_dict = kwargs.pop("return_dict", None)
        out = super().forward(
            inputs_embeds=embeds, position_ids=torch.zeros_like(embeds[:1, :, 0], dtype=torch.long),
            past_key_values=cache, decode_step=step, return_dict=True, **kwargs,
        )  # fmt: skip
        if order is not None:
            out.last_hidden_state = out_of_order(out.last_hidden_state, order)
            if out.hidden_states is not None:
                out.hidden_states = tuple(out_of_order(hidden, order) for hidden in out.hidden_states)
        return out if return_dict or (return_dict is None and self.config.return_dict) else out.to_tuple()
