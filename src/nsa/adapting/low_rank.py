"""LoRA (arXiv:2106.09685) as a parametrization: W + B A, with B zero at the start."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nsa.adapting.layers import is_new


class LowRank(nn.Module):
    """What is added to a weight [out, width]: B [out, rank] times A [rank, width]."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn_like(weight[:1].expand(rank, -1)) * weight.shape[1] ** -0.5)
        self.b = nn.Parameter(torch.zeros_like(weight[:, :1].expand(-1, rank)))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


def add_low_rank(model: Any, rank: int) -> None:
    """Train only low ranks of the decoder's linear maps, and what a dense model has not, as it is."""
    maps = [(name, module) for name, module in model.model.named_modules() if isinstance(module, nn.Linear)]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_new(name))
    for name, module in maps:
        if not is_new(f".{name}.weight"):
            parametrize.register_parametrization(module, "weight", LowRank(module.weight.detach(), rank))


def merge(model: Any) -> None:
    """Put the sums in the place of the weights."""
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
