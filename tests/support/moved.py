"""Modules whose weights are not where they start: there gates are 1/2, phi is a mean, and much cancels."""

from typing import TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def moved(module: Module, by: float) -> Module:
    """The module, its parameters moved at random by about so much."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * by)
    return module
