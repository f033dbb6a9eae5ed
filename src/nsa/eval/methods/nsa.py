"""NSA and InfLLM-V2 themselves, for models that have them; no other method can be laid over their attention."""

from collections.abc import Sequence as Numbers
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from nsa.eval.blocks import LayerSelection, limits_of_dense_layers, selections_of
from nsa.eval.methods.method import PHASES, Method
from nsa.methods.registry import trained


@dataclass(frozen=True, kw_only=True)
class NSA(Method):
    """The model's own attention: compressed keys, selected blocks and the window, in both phases.

    Its sizes are those of the model's configuration; the budget of the others does not change them. Compressed keys
    count as one key each.

    Source: arXiv:2502.11089.
    """

    name: ClassVar[str] = "nsa"
    paper: ClassVar[str] = "https://arxiv.org/abs/2502.11089"
    native: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class InfLLMv2(Method):
    """InfLLM-V2, for models with attention="infllm_v2": in both phases the selected blocks, the window's among them.

    Its sizes are those of the model's configuration; up to its `dense_len` a query reads every key. Pooled keys, each
    counted as one, are read only to choose.

    Source: arXiv:2509.24663.
    """

    name: ClassVar[str] = "infllm_v2"
    paper: ClassVar[str] = "https://arxiv.org/abs/2509.24663"
    native: ClassVar[bool] = True


class Keys(NamedTuple):
    """Of one query: keys in a softmax, and keys read only to choose them; means over queries, layers and KV heads."""

    attended: float
    scored: float


def keys_read(model: nn.Module, tokens: Numbers[int], decode: int) -> dict[str, Keys]:
    """Keys that one query reads in each phase, counted from the blocks it selected in one sequence of `tokens`.

    The last `decode` tokens are the phase of decoding. Layers that the model keeps dense count with all that they see.
    """
    config: Any = model.config
    layers = [_per_position(layer) for layer in selections_of(model, tokens)]
    seen = torch.arange(1, len(tokens) + 1).double()
    layers += [torch.stack([seen.clamp(max=most), 0 * seen]) for most in limits_of_dense_layers(config, len(tokens))]
    counts, border = torch.stack(layers).mean(0), len(tokens) - decode
    parts = zip(PHASES, (counts[:, :border], counts[:, border:]), strict=True)
    return {phase: Keys(*part.mean(1).tolist()) if part.numel() else Keys(0.0, 0.0) for phase, part in parts}


def keys_of_last(config: Any, length: int) -> int:
    """Keys in the softmaxes of the last of `length` queries, by a model's configuration: the mean over its layers.

    The query's own block counts as full, so that no query reads more.
    """
    method = trained(config)
    sparse = method.reads(method.sizes_of(config)).last(length).attended
    each = [sparse] * len(config.sparse_layers) + limits_of_dense_layers(config, length)
    return round(sum(each) / len(each))


def _per_position(layer: LayerSelection) -> torch.Tensor:
    """Keys attended to and keys scored by every position, averaged over the groups, [2, t]."""
    size = layer.config.select_block_size
    positions = torch.arange(layer.block_indices.shape[0])
    first = layer.block_indices * size
    selected = (torch.minimum(positions[:, None, None] + 1, first + size) - first) * (layer.block_indices >= 0)
    listed, besides = selected.sum(-1).double().mean(-1), layer.keys_besides(positions).double()
    return torch.stack([listed + besides, 0 * besides] if layer.infllm_v2 is None else [listed, besides])
