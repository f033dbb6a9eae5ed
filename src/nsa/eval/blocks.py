"""What a model with NSA or InfLLM-V2 reads: the blocks each query selects, and the number of keys behind them."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nsa.config import InfLLMv2Config, NSAConfig
from nsa.methods.registry import TRAINED
from nsa.models.families import window_of
from nsa.modules.attention import NativeSparseAttention
from nsa.modules.infllm_v2 import InfLLMv2Attention


@dataclass(frozen=True)
class LayerSelection:
    """One layer's scores and selected blocks for every query of one sequence; `config` has InfLLM-V2's as NSA's."""

    config: NSAConfig
    block_scores: Float[Tensor, "t g blocks"]
    block_indices: Int[Tensor, "t g n"]
    infllm_v2: InfLLMv2Config | None = None

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
        """Keys of the selected blocks up to the query, and `keys_besides`, counted."""
        size = self.config.select_block_size
        selected = sum(min(position + 1, (b + 1) * size) - b * size for b in self.selected(position, group))
        return selected + int(self.keys_besides(torch.tensor([position]))[0])

    def keys_besides(self, positions: Int[Tensor, " t"]) -> Int[Tensor, " t"]:
        """Compressed keys and keys of the window; of InfLLM-V2 the pooled keys, where blocks have to be chosen."""
        c = self.config
        visible = ((positions + 1 - c.compress_block_size) // c.compress_stride + 1).clamp(min=0)
        if self.infllm_v2 is not None:
            return visible * (positions >= self.infllm_v2.sees_all)
        return visible + (positions + 1).clamp(max=c.window_size)


def selections_of(model: nn.Module, tokens: Sequence[int]) -> list[LayerSelection]:
    """Run one sequence through the model and ask each of its sparse layers what it selected; [] for other models."""
    kinds = (NativeSparseAttention, InfLLMv2Attention)
    layers = [module for module in model.modules() if isinstance(module, kinds)]
    inputs: dict[int, Tensor] = {}
    hooks = [layer.register_forward_pre_hook(keep(inputs, i), with_kwargs=True) for i, layer in enumerate(layers)]
    device = next(model.parameters()).device
    try:
        with torch.inference_mode():
            model(input_ids=torch.tensor([list(tokens)], device=device), use_cache=False, logits_to_keep=1)
            found = [layer.select(inputs[i]) for i, layer in enumerate(layers)]
    finally:
        for hook in hooks:
            hook.remove()
    return [
        _selection(layer.config, scores[0].float().cpu(), indices[0].cpu())
        for layer, (scores, indices) in zip(layers, found, strict=True)
    ]


def _selection(config: NSAConfig | InfLLMv2Config, scores: Tensor, indices: Tensor) -> LayerSelection:
    if isinstance(config, InfLLMv2Config):
        return LayerSelection(config.blocks, scores, indices, config)
    return LayerSelection(config, scores, indices)


def keys_per_query(attention: str, config: NSAConfig | InfLLMv2Config, context: int) -> int:
    """The formula: keys that the last of `context` positions reads in each kind of twin."""
    return TRAINED[attention].reads(config).last(context).keys


def limits_of_dense_layers(config: Any, length: int) -> list[int]:
    """Of each layer without the method, the most keys that one of `length` queries sees."""
    dense = sorted(set(range(config.num_hidden_layers)) - set(config.sparse_layers))
    return [min(length, window_of(config, number) or length) for number in dense]


def counted_keys(layers: Sequence[LayerSelection], position: int, dense: Sequence[int] = ()) -> float:
    """Keys read by the query at `position`, counted from what was selected: the mean over layers and groups.

    `dense` has the keys of each layer that the model keeps dense beside them.
    """
    each = [[layer.keys_read(position, group) for group in range(layer.num_groups)] for layer in layers]
    return statistics.fmean([*map(statistics.fmean, each), *dense])


def keep(inputs: dict[int, Tensor], index: int) -> Any:
    """A hook before a layer's forward that keeps its hidden states in inputs[index]."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs[index] = args[0] if args else kwargs["hidden_states" if "hidden_states" in kwargs else "x"]

    return hook
