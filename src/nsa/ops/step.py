"""What stands between the products of a decoder layer in a decoding step, where rows are few.

In PyTorch; the kernels of `nsa.kernels.step` do the same, each in one launch. Every such operation takes microseconds,
most of them spent on waiting for the one before.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nsa.shapes import bind


def add_norm(
    residual: Float[Tensor, "rows width"],
    x: Float[Tensor, "rows width"] | None,
    weight: Float[Tensor, " width"],
    eps: float,
) -> tuple[Float[Tensor, "rows width"], Float[Tensor, "rows width"]]:
    """The residual with x added, and its RMS norm.

        total = residual + x                          rounded to the dtype
        z = weight * total / sqrt(mean(total^2) + eps)

    Args:
        residual: one row a token.
        x: what is added; None where there is nothing yet.
        weight, eps: of the norm.

    Raises:
        ValueError: shapes that do not fit.
    """
    given = {"residual": (residual, "rows width"), "weight": (weight, "width")}
    bind("add_norm", **(given if x is None else given | {"x": (x, "rows width")}))
    total = residual if x is None else residual + x
    return total, F.rms_norm(total, weight.shape, weight, eps)


def swiglu(gate_and_up: Float[Tensor, "rows two_widths"]) -> Float[Tensor, "rows width"]:
    """silu(gate) * up of the two halves of each row, in this order, the first factor rounded to the dtype.

    Raises:
        ValueError: rows that have no halves.
    """
    if gate_and_up.dim() != 2 or gate_and_up.shape[1] % 2:
        raise ValueError(f"swiglu: gate_and_up should have shape [rows, 2 width], got {list(gate_and_up.shape)}")
    gate, up = gate_and_up.chunk(2, dim=-1)
    return F.silu(gate) * up
