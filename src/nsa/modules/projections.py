"""Linear maps of one input as one product, as long as each of them is no more than its weights."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class StartingLinear(nn.Linear):
    """An ordinary nn.Linear but for its first weight, which `start` makes of one like it; its bias starts at zero."""

    def __init__(self, width: int, out: int, start: Callable[[Tensor], Tensor], *, bias: bool = True) -> None:
        self.start = start
        super().__init__(width, out, bias=bias)

    @torch.no_grad()
    def reset_parameters(self, copy: Callable[[Tensor, Tensor], Any] = Tensor.copy_) -> None:
        copy(self.weight, self.start(self.weight))
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def is_plain(module: nn.Module) -> bool:
    """Whether calling the module is its weights' product and nothing else.

    Not so for adapters, quantized, sharded or offloaded weights, parametrizations, and where hooks listen.
    """
    return (
        isinstance(module, nn.Linear)
        and type(module).forward is nn.Linear.forward
        and type(module.weight) is nn.Parameter
        and not module.weight.is_meta
        and not is_hooked(module)
    )


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody listens to the module's calls, or has replaced them."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    ) or "forward" in vars(module)


def project(x: Float[Tensor, "b t hidden"], maps: Sequence[nn.Module]) -> list[Float[Tensor, "b t _"]]:
    """[one(x) for one in maps]; in training, where all are plain, one product of their weights side by side.

    The parts are views of one product and live as long as any of them; without gradients each goes when it is used up.
    """
    plain = [one for one in maps if isinstance(one, nn.Linear) and is_plain(one)]
    if len(plain) < len(maps) or not torch.is_grad_enabled():
        return [one(x) for one in maps]
    parts = F.linear(x, torch.cat([one.weight for one in plain])).split([one.out_features for one in plain], -1)
    return [y if one.bias is None else y + one.bias.to(y.dtype) for one, y in zip(plain, parts, strict=True)]
