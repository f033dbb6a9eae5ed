"""Which tokens each compression block of packed sequences covers, and which blocks cover a token: on the device.

Block r is the (r - first[i])-th of sequence i and begins at token cu[i] + (r - first[i]) d. How many blocks there are
depends on the lengths, which stay on the device; how many there can be follows from shapes: a sequence of n tokens has
at most n // d, so s tokens have at most s // d.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nsa.config import NSAConfig
from nsa.shapes import sequence_of


@dataclass(frozen=True)
class PackedBlocks:
    """Index tensors of the s // d blocks that s packed tokens can have; those that exist come first.

    tokens: rows of each block, any legal row where it does not exist.
    exists: which blocks there are.
    covering: for each token the blocks that cover it and its place there, as block * l + place, any legal number ..
    covers: .. where there is none.
    """

    tokens: Int[Tensor, "c l"]
    exists: Bool[Tensor, " c"]
    covering: Int[Tensor, "s l_over_d"]
    covers: Bool[Tensor, "s l_over_d"]

    @classmethod
    def of(cls, cu_seqlens: Int[Tensor, " sequences_plus_1"], num_tokens: int, config: NSAConfig) -> "PackedBlocks":
        """Of sequences that follow one another as `cu_seqlens` says, any number of them empty."""
        size, stride, device = config.compress_block_size, config.compress_stride, cu_seqlens.device
        count, cu = num_tokens // stride, cu_seqlens.long()
        first = first_blocks(cu, config)
        own = first.diff()

        block = torch.arange(count, device=device)
        sequence = sequence_of(first, block)
        start = cu[sequence] + (block - first[sequence]) * stride
        tokens = (start[:, None] + torch.arange(size, device=device)).clamp(0, max(num_tokens - 1, 0))

        token = torch.arange(num_tokens, device=device)
        sequence = sequence_of(cu, token)
        position = token - cu[sequence]
        # The last block that could cover the token, and those just before it.
        candidate = position[:, None] // stride - torch.arange(size // stride, device=device)
        covers = (candidate >= 0) & (candidate < own[sequence, None])
        covering = (first[sequence, None] + candidate) * size + position[:, None] - candidate * stride
        return cls(tokens, block < first[-1], covering.where(covers, 0), covers)

    def gather(self, x: Float[Tensor, "1 s g d"]) -> Float[Tensor, "1 c g l d"]:
        """The blocks of x; zeros where there is none. Backward adds up in one order and without atomic additions."""
        return _Gather.apply(x, self.tokens, self.exists, self.covering, self.covers)

    def of_first_token(self, x: Float[Tensor, "1 s d"]) -> Float[Tensor, "1 c d"]:
        """What x says of the first token of each block, such as its rotary factors."""
        return x[:, self.tokens[:, 0]]


def first_blocks(cu_seqlens: Int[Tensor, " sequences_plus_1"], config: NSAConfig) -> Int[Tensor, " sequences_plus_1"]:
    """Where the blocks of each sequence begin among those of all, and how many there are."""
    own = (cu_seqlens.diff() - config.compress_block_size).div(config.compress_stride, rounding_mode="floor") + 1
    return torch.cat([own.new_zeros(1), own.clamp_min(0).cumsum(0)])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tensor, exists: Tensor, covering: Tensor, covers: Tensor) -> Tensor:
        ctx.save_for_backward(covering, covers)
        blocks = torch.where(exists[:, None, None, None], x[0][tokens], 0.0)
        return blocks.transpose(1, 2)[None]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        covering, covers = ctx.saved_tensors
        lines = grad[0].transpose(1, 2).flatten(0, 1)  # [c l, g, d]
        if lines.shape[0] == 0:
            return grad.new_zeros(1, covering.shape[0], grad.shape[2], grad.shape[4]), None, None, None, None
        sums = torch.where(covers[:, 0, None, None], lines[covering[:, 0]], 0.0)
        for at, is_one in zip(covering[:, 1:].unbind(1), covers[:, 1:].unbind(1), strict=True):
            sums = sums + torch.where(is_one[:, None, None], lines[at], 0.0)
        return sums[None], None, None, None, None
