"""NSA and InfLLM-V2 themselves, for models that have them; no other method can be laid over their attention."""

from collections.abc import Sequence as Numbers
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from nsa.eval.blocks import LayerSelection, selections_of
from nsa.eval.methods.method import Method


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

    Its sizes are those of the model's configuration. Pooled keys, read only to choose, count as one key each.

    Source: arXiv:2509.24663.
    """

    name: ClassVar[str] = "infllm_v2"
    paper: ClassVar[str] = "https://arxiv.org/abs/2509.24663"
    native: ClassVar[bool] = True


def keys_read(model: nn.Module, tokens: Numbers[int], decode: int) -> dict[str, float]:
    """Keys that one query reads in each phase, counted from the blocks it selected in one sequence of `tokens`.

    The last `decode` tokens are the phase of decoding; the mean over the phase's queries, layers and KV heads.
    """
    layers = selections_of(model, tokens)
    counts = torch.stack([_per_position(layer) for layer in layers]).mean(0)
    border = len(tokens) - decode
    phases = {"prefill": counts[:border], "decode": counts[border:]}
    return {phase: float(part.mean()) if len(part) else 0.0 for phase, part in phases.items()}


def _per_position(layer: LayerSelection) -> torch.Tensor:
    """`LayerSelection.keys_read` of every position at once, averaged over the groups, [t]."""
    size = layer.config.select_block_size
    positions = torch.arange(layer.block_indices.shape[0])
    first = layer.block_indices * size
    selected = (torch.minimum(positions[:, None, None] + 1, first + size) - first) * (layer.block_indices >= 0)
    return selected.sum(-1).double().mean(-1) + layer.keys_besides(positions)
