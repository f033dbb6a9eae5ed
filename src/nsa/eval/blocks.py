"""What an NSA model reads: the blocks each of its queries selects, and the number of keys behind them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nsa.config import NSAConfig
from nsa.modules.attention import NativeSparseAttention


@dataclass(frozen=True)
class LayerSelection:
    """One layer's scores and selected blocks for every query of one sequence."""

    config: NSAConfig
    block_scores: Float[Tensor, "t g blocks"]
    block_indices: Int[Tensor, "t g n"]

    @property
    def num_groups(self) -> int:
        return self.block_indices.shape[1]

    def selected(self, position: int, group: int) -> list[int]:
        """The blocks of one query, ascending, without the empty slots."""
        return [block for block in self.block_indices[position, group].tolist() if block >= 0]

    def forced(self, position: int) -> list[int]:
        """The first blocks, and the query's own with those just before it: selected whatever their scores."""
        own = position // self.config.select_block_size
        first = range(min(self.config.num_initial_blocks, own + 1))
        local = range(max(0, own - self.config.num_local_blocks + 1), own + 1)
        return sorted({*first, *local})

    def keys_read(self, position: int, group: int) -> int:
        """Compressed keys, keys of the selected blocks up to the query, and keys of the window, counted."""
        size = self.config.select_block_size
        selected = sum(min(position + 1, (b + 1) * size) - b * size for b in self.selected(position, group))
        window = min(position + 1, self.config.window_size)
        return self.config.num_visible_compressed_blocks(position) + selected + window


def selections_of(model: nn.Module, tokens: Sequence[int]) -> list[LayerSelection]:
    """Run one sequence through the model and ask each of its NSA layers what it selected; [] for other models."""
    layers = [module for module in model.modules() if isinstance(module, NativeSparseAttention)]
    inputs: dict[int, Tensor] = {}
    hooks = [layer.register_forward_pre_hook(_keep(inputs, i), with_kwargs=True) for i, layer in enumerate(layers)]
    device = next(model.parameters()).device
    try:
        with torch.inference_mode():
            model(input_ids=torch.tensor([list(tokens)], device=device), use_cache=False, logits_to_keep=1)
            found = [layer.select(inputs[i]) for i, layer in enumerate(layers)]
    finally:
        for hook in hooks:
            hook.remove()
    return [
        LayerSelection(layer.config, scores[0].float().cpu(), indices[0].cpu())
        for layer, (scores, indices) in zip(layers, found, strict=True)
    ]


def keys_per_query(attention: str, config: NSAConfig, context: int) -> int:
    """The formula: keys that the last of `context` positions reads in each kind of twin."""
    if attention == "nsa":
        return config.keys_per_query(context)
    return min(context, config.window_size) if attention == "window" else context


def counted_keys(layers: Sequence[LayerSelection], position: int) -> float:
    """Keys read by the query at `position`, counted from what was selected: the mean over layers and groups."""
    counts = [layer.keys_read(position, group) for layer in layers for group in range(layer.num_groups)]
    return sum(counts) / len(counts)


def _keep(inputs: dict[int, Tensor], index: int) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs[index] = args[0] if args else kwargs["hidden_states" if "hidden_states" in kwargs else "x"]

    return hook
