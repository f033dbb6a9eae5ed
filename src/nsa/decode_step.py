"""What all layers of a decoding step over a static or paged cache share."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from nsa.config import NSAConfig

Rotary = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class DecodeStep:
    """What all layers of a decoding step of t new tokens share, on the device, from the lengths before it.

    counts: how many of the t columns are tokens, the last ones of each row; None where all are.
    cos, sin: rotary factors of the columns, where queries and keys are not rotated yet.
    cos_cmp, sin_cmp: those of the compressed keys whose blocks may complete: column j is for the block that ends with
        stride length // d + j, `length` being the one before the step, so for position (length // d + j + 1) d - l
        (whatever where that is negative: there is no such block).
    """

    counts: Int32[Tensor, " b"] | None
    cos: Float[Tensor, "b t d"] | None
    sin: Float[Tensor, "b t d"] | None
    cos_cmp: Float[Tensor, "b new d"]
    sin_cmp: Float[Tensor, "b new d"]

    @classmethod
    def after(
        cls,
        lengths: Int32[Tensor, " b"],
        t: int,
        counts: Int32[Tensor, " b"] | None,
        config: NSAConfig,
        rotary: Rotary,
        like: Tensor,
    ) -> "DecodeStep":
        """The step of t columns after `lengths` tokens; `like` gives the factors' dtype and device."""
        first = lengths + (0 if counts is None else counts - t)
        positions = first[:, None] + torch.arange(t, device=lengths.device)
        # The block that ends with stride number c begins at (c + 1) d - l; c = length // d is the first to complete.
        stride = config.compress_stride
        strides = lengths[:, None] // stride + torch.arange(-(-t // stride), device=lengths.device)
        blocks = (strides + 1) * stride - config.compress_block_size
        factors = rotary(like, torch.cat([positions, blocks], dim=1).clamp(min=0))
        (cos, cos_cmp), (sin, sin_cmp) = ((x[:, :t].contiguous(), x[:, t:].contiguous()) for x in factors)
        return cls(counts, cos, sin, cos_cmp, sin_cmp)
