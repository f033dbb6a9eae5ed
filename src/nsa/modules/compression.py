"""phi with its weights: what turns a block of l keys (or values) into one."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nsa.config import NSAConfig
from nsa.ops.compress import phi_linear, phi_mean, phi_mlp


class Compression(nn.Module):
    """phi of one kind of vector, keys or values, for all KV heads; it starts as the mean of the block.

    mean    no parameters
    linear  W flatten(block), W [dim, l dim], starting as the mean exactly
    mlp     mean(block) + MLP(flatten(block + position encoding)), the MLP's last layer zero at the start
    """

    def __init__(self, dim: int, config: NSAConfig) -> None:
        super().__init__()
        self.kind, self.block_size, self.dim = config.compression, config.compress_block_size, dim
        if self.kind == "linear":
            self.weight = nn.Parameter(torch.empty(dim, self.block_size * dim))
        elif self.kind == "mlp":
            self.position_encoding = nn.Parameter(torch.empty(self.block_size, dim))
            self.hidden = nn.Linear(self.block_size * dim, 2 * dim)
            self.out = nn.Linear(2 * dim, dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.kind == "linear":
            mean = torch.eye(self.dim, dtype=self.weight.dtype) / self.block_size
            self.weight.copy_(mean.repeat(1, self.block_size))
        elif self.kind == "mlp":
            nn.init.normal_(self.position_encoding, std=0.02)
            self.hidden.reset_parameters()
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

    def forward(self, blocks: Float[Tensor, "*blocks l d"]) -> Float[Tensor, "*blocks d"]:
        if self.kind == "mean":
            return phi_mean(blocks)
        if self.kind == "linear":
            return phi_linear(blocks, self.weight)
        return phi_mlp(
            blocks,
            self.position_encoding,
            self.hidden.weight,
            self.hidden.bias,
            self.out.weight,
            self.out.bias,
        )

    def weights(self) -> tuple[Tensor, ...]:
        """In the order in which `nsa.ops.compress` takes them after the blocks."""
        if self.kind == "mean":
            return ()
        if self.kind == "linear":
            return (self.weight,)
        hidden, out = self.hidden, self.out
        return self.position_encoding, hidden.weight, hidden.bias, out.weight, out.bias
