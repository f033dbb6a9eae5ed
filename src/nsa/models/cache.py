"""The caches of `nsa.cache` as transformers wants them: one layer object for each layer of the model."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from nsa.cache import FixedNSACache, LayerCache, NSACache, PagedNSACache, StaticNSACache, convert
from nsa.models.configuration import SPARSE, NSALlamaConfig

Layout = Literal["growing", "static", "paged"]


class NSALlamaCache(Cache):
    """The cache of a model with NSA; `generate()` makes one by itself. Dense layers of it have transformers' own.

    Args:
        config: the model's configuration; with `dense_layers` only "growing" serves.
        layout: "growing"; "static", with room for `max_length` tokens a row; or "paged", whose rows take pages of a
            pool and share them (`nsa.cache` says how).
        max_length: tokens that a row may hold; needed for "static", by default the whole pool for "paged".
        num_pages, page_size: of the pool of each layer, for "paged".
        max_crop: how many tokens can be taken back (assisted decoding).
        max_new: tokens of a decoding step, at most, in static and paged caches.

    Raises:
        ValueError: sizes that the layout needs and that are missing.
    """

    def __init__(
        self,
        config: NSALlamaConfig,
        *,
        layout: Layout = "growing",
        max_length: int | None = None,
        num_pages: int | None = None,
        page_size: int = 256,
        max_crop: int = 64,
        max_new: int = 16,
    ) -> None:
        nsa = config.nsa_config

        def new() -> LayerCache:
            if layout == "growing":
                return NSACache(nsa, max_crop=max_crop)
            if layout == "static" and max_length is not None:
                return StaticNSACache(nsa, max_length, max_crop=max_crop, max_new=max_new)
            if layout == "paged" and num_pages is not None:
                return PagedNSACache(
                    nsa, num_pages, page_size=page_size, max_length=max_length, max_crop=max_crop, max_new=max_new
                )
            raise ValueError(
                "NSALlamaCache: expected layout 'growing', 'static' with max_length, or 'paged' with num_pages; got "
                f"{layout!r} with max_length={max_length} and num_pages={num_pages}"
            )

        if config.dense_layers and layout != "growing":
            raise ValueError(f"NSALlamaCache: layers that stay dense need layout 'growing', got {layout!r}")
        sparse = config.sparse_layers if config.dense_layers else range(config.num_hidden_layers)
        super().__init__(
            layers=[
                NSALlamaCacheLayer(new()) if number in sparse else dense_layer(config, number)
                for number in range(config.num_hidden_layers)
            ]
        )
        self.layout = layout
        # Whether decoding steps over this cache are CUDA graphs, which `generate()` decides, and the captured one
        # (`nsa.models.captured_step.CapturedStep`), which belongs to the addresses of this cache.
        self.cuda_graphs = False
        self.captured_step: Any = None

    @property
    def caches(self) -> list[LayerCache]:
        """Of every layer with NSA."""
        return [layer.nsa for layer in self.layers if isinstance(layer, NSALlamaCacheLayer)]

    @property
    def fixed(self) -> list[FixedNSACache]:
        """Of every layer, where they are static or paged and have their memory; else none."""
        if self.layout == "growing":
            return []
        return [layer.nsa for layer in self.layers if layer.nsa.is_allocated]

    def is_step(self, t: int) -> bool:
        """`nsa.cache.LayerCache.is_step` of the layers, which are alike."""
        return bool(self.fixed) and self.fixed[0].is_step(t)

    def check_config(self, config: NSALlamaConfig) -> None:
        """ValueError where a model of this configuration cannot use the cache: it was made for another one."""
        if len(self.layers) != config.num_hidden_layers:
            mine, its = len(self.layers), config.num_hidden_layers
            raise ValueError(f"NSALlamaCache: it was made for {mine} layers, but the model has {its}")
        self.caches[0].check_config(config.nsa_config)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """`nsa.cache.LayerCache.transaction` of all layers together: a token that came to some came to all."""
        with ExitStack() as stack:
            stack.enter_context(self._columns_if_it_raises())
            for cache in self.caches:
                stack.enter_context(cache.transaction())
            yield

    @contextmanager
    def bounds_if_it_raises(self) -> Iterator[None]:
        """A cheap `transaction` of static and paged caches for what cannot stop half way on the device, as a graph.

        If the block raises, the host may have been told of tokens that the device never got: it will ask.
        """
        with self._columns_if_it_raises():
            try:
                yield
            except BaseException:
                for cache in self.fixed:
                    cache.ask_lengths()
                raise

    @contextmanager
    def _columns_if_it_raises(self) -> Iterator[None]:
        # Of a dense layer all that it holds: an update makes new tensors.
        before = [
            {"num_columns": layer.num_columns} if isinstance(layer, NSALlamaCacheLayer) else dict(vars(layer))
            for layer in self.layers
        ]
        try:
            yield
        except BaseException:
            for layer, values in zip(self.layers, before, strict=True):
                vars(layer).update(values)
            raise

    def check_mask(self, attention_mask: Tensor, t: int) -> None:
        """ValueError where the mask says otherwise of cached columns than the cache, which cannot hide a token again.

        Args:
            attention_mask: of the t new columns; or of all, [rows, cached + t], which must show as many of a row's
                cached columns as the cache has tokens of it. Of a decoding step on a GPU the latter is not asked:
                the answer would wait for the device.
            t: new columns.
        """
        past = self.get_seq_length()
        if attention_mask.dim() != 2 or attention_mask.shape[1] <= t or not past:
            return
        if attention_mask.shape[1] != past + t:
            raise ValueError(
                f"attention_mask should have t={t} columns, or {past + t} with the cached ones; "
                f"got {list(attention_mask.shape)}"
            )
        if attention_mask.is_cuda and self.is_step(t):
            return
        shown, held = (attention_mask[:, :past] != 0).sum(1).tolist(), self.caches[0].lengths
        if len(shown) == len(held) and shown != held:
            row = next(row for row, pair in enumerate(zip(shown, held, strict=True)) if pair[0] != pair[1])
            raise ValueError(
                f"attention_mask shows {shown[row]} of row {row}'s cached tokens, the cache holds {held[row]}; "
                "what is cached cannot be hidden"
            )

    def make_room(self, t: int, counts: Tensor | None = None) -> None:
        """`FixedNSACache.make_room` of every layer. All have the same room: the first refuses, or none."""
        for cache, layer in zip(self.fixed, self.layers, strict=True):
            cache.make_room(t, counts)
            layer.num_columns += t

    def convert(self, target: "NSALlamaCache") -> "NSALlamaCache":
        """Put what this cache remembers into `target`, of any layout, and return it; see `nsa.cache.convert`."""
        for source, other in zip(self.layers, target.layers, strict=True):
            if isinstance(source, NSALlamaCacheLayer):
                convert(source.nsa, other.nsa)
                other.num_columns = source.num_columns
            else:
                vars(other).update(vars(source))
        return target

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        self._share_lengths()
        super().crop(int(tokens_to_remove))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._share_lengths()
        super().reorder_cache(beam_idx.cpu())  # asked for once, not by every layer

    def _share_lengths(self) -> None:
        """Ask the device for the lengths once, not for every layer."""
        for other in self.fixed[1:]:
            other.know_lengths(self.fixed[0].lengths)

    def num_bytes(self) -> int:
        """Bytes of all keys and values; see `nsa.cache.LayerCache.num_bytes`."""
        dense = (layer for layer in self.layers if not isinstance(layer, NSALlamaCacheLayer) and layer.is_initialized)
        return sum(cache.num_bytes() for cache in self.caches) + sum(x.keys.nbytes + x.values.nbytes for x in dense)


def dense_layer(config: Any, number: int) -> DynamicLayer:
    """The cache of a layer that keeps the attention of its family, over all keys or a sliding window of them."""
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if window is not None and (kinds is None or kinds[number] == "sliding_attention"):
        return DynamicSlidingWindowLayer(window)
    return DynamicLayer()


def all_or_nothing(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a model's forward refuse an NSALlamaCache of another model, and leave it as it was if it raises."""

    @wraps(forward)
    def with_cache(model: Any, *args: Any, **kwargs: Any) -> Any:
        given = (*args[3:4], kwargs.get("past_key_values"))
        cache = next((one for one in given if isinstance(one, NSALlamaCache)), None)
        if cache is None or model.config.attention not in SPARSE:
            return forward(model, *args, **kwargs)
        cache.check_config(model.config)
        with cache.transaction():
            return forward(model, *args, **kwargs)

    return with_cache


class NSALlamaCacheLayer(DynamicLayer):
    """One layer. transformers counts columns, padding included; the cache of the layer counts tokens."""

    def __init__(self, nsa: LayerCache) -> None:
        super().__init__()
        self.nsa = nsa
        self.num_columns = 0

    def reset(self) -> None:
        self.nsa.clear()
        self.num_columns = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: the first append knows shapes, dtype and device."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise ValueError("an NSA cache holds three branches: it belongs to a model with attention='nsa' or 'infllm_v2'")

    def get_seq_length(self) -> int:
        return self.num_columns

    def get_max_length(self) -> int:
        """Tokens that a row may hold; -1 if it grows."""
        return getattr(self.nsa, "max_length", -1)

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Remove the last tokens; a positive number is the length to keep, as in transformers' older versions."""
        tokens_to_remove = int(tokens_to_remove)
        remove = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.num_columns - tokens_to_remove)
        if remove:
            self.nsa.crop(remove)
            self.num_columns -= remove

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.num_columns:
            self.nsa.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.reorder_cache(torch.arange(len(self.nsa.lengths)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.num_columns:
            self.nsa.reorder(torch.arange(len(self.nsa.lengths), device=indices.device)[indices])
