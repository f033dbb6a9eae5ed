"""phi with its weights: what turns a block of l keys (or values) into one."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from nsa.config import NSAConfig
from nsa.distributed.tensor import summed_gradient
from nsa.modules.projections import StartingLinear, is_plain
from nsa.ops.compress import PHI, phi_mean


class Compression(nn.Module):
    """phi of one kind of vector, keys or values, for all KV heads; it starts as the mean of the block.

    mean    no parameters
    linear  W flatten(block), W [dim, l dim], starting as the mean exactly
    mlp     mean(block) + MLP(flatten(block + position encoding)), the MLP's last layer zero at the start

    Its maps are ordinary `nn.Linear`s and are called as modules wherever they are more than their weights.

    Attributes:
        heads_of: the ranks that have the other KV heads, whose gradients are added to this one's.
    """

    heads_of: ProcessGroup | None = None

    def __init__(self, dim: int, config: NSAConfig) -> None:
        super().__init__()
        self.kind, self.block_size, self.dim = config.compression, config.compress_block_size, dim
        if self.kind == "linear":
            self.out = StartingLinear(
                self.block_size * dim, dim, partial(_mean, block_size=self.block_size), bias=False
            )
        elif self.kind == "mlp":
            self.position_encoding = nn.Parameter(torch.empty(self.block_size, dim))
            self.hidden = nn.Linear(self.block_size * dim, 2 * dim)
            self.out = StartingLinear(2 * dim, dim, torch.zeros_like)
        self.register_load_state_dict_pre_hook(_rename_old)
        self.reset_parameters()

    def reset_position_encoding(self, std: float = 0.02) -> None:
        if self.kind == "mlp":
            nn.init.normal_(self.position_encoding, std=std)

    def reset_parameters(self) -> None:
        self.reset_position_encoding()
        for part in self.children():
            if isinstance(part, nn.Linear):
                part.reset_parameters()

    def forward(self, blocks: Float[Tensor, "*blocks l d"]) -> Float[Tensor, "*blocks d"]:
        if self.heads_of is not None:
            return self._of_some_heads(blocks, self.heads_of)
        if self.is_plain():
            return PHI[self.kind](blocks, *self.weights())
        if self.kind == "linear":
            return self.out(blocks.flatten(-2))
        hidden = F.gelu(self.hidden((blocks + self.position_encoding).flatten(-2)))
        return phi_mean(blocks) + self.out(hidden)

    def _of_some_heads(self, blocks: Tensor, group: ProcessGroup) -> Tensor:
        if not self.is_plain():
            raise ValueError("Compression: under tensor parallelism phi is its weights, without adapters and hooks")
        return PHI[self.kind](blocks, *(summed_gradient(weight, group) for weight in self.weights()))

    def weights(self) -> tuple[Tensor, ...]:
        """In the order in which `nsa.ops.compress` takes them after the blocks."""
        if self.kind == "mean":
            return ()
        if self.kind == "linear":
            return (self.out.weight,)
        hidden, out = self.hidden, self.out
        return self.position_encoding, hidden.weight, hidden.bias, out.weight, out.bias

    def is_plain(self) -> bool:
        """Whether `weights` are all that it is."""
        return all(is_plain(part) for part in self.children())


def _mean(like: Float[Tensor, "d ld"], block_size: int) -> Float[Tensor, "d ld"]:
    """The map of a flat block to its mean."""
    return torch.eye(len(like), dtype=like.dtype, device=like.device).repeat(1, block_size) / block_size


def _rename_old(module: Compression, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A linear phi was one parameter of its own before it was an nn.Linear."""
    if prefix + "weight" in state:
        state[prefix + "out.weight"] = state.pop(prefix + "weight")
