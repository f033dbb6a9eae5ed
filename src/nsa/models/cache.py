"""`NSACache` as transformers wants it: one layer object for each layer of the model."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from nsa.cache import NSACache
from nsa.config import NSAConfig
from nsa.models.configuration import NSALlamaConfig


class NSALlamaCache(Cache):
    """The cache of an NSALlama model; `generate()` makes one by itself.

    Args:
        config: the model's configuration.
        max_crop: how many tokens can be taken back (assisted decoding).
    """

    def __init__(self, config: NSALlamaConfig, *, max_crop: int = 64) -> None:
        layers = [NSALlamaCacheLayer(config.nsa_config, max_crop) for _ in range(config.num_hidden_layers)]
        super().__init__(layers=layers)

    def num_bytes(self) -> int:
        """Bytes of all keys and values remembered."""
        return sum(layer.nsa.num_bytes() for layer in self.layers)


class NSALlamaCacheLayer(DynamicLayer):
    """One layer. transformers counts columns, padding included; NSACache counts tokens."""

    def __init__(self, config: NSAConfig, max_crop: int) -> None:
        super().__init__()
        self.config, self.max_crop = config, max_crop
        self.reset()

    def reset(self) -> None:
        self.nsa = NSACache(self.config, max_crop=self.max_crop)
        self.num_columns = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: the first append knows shapes, dtype and device."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise ValueError("an NSA cache holds three branches: it belongs to a model with attention='nsa'")

    def get_seq_length(self) -> int:
        return self.num_columns

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
