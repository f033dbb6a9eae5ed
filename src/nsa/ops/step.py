"""The maps of a decoding step, each with what a decoder layer does right after it.

In PyTorch; `nsa.kernels.step` does the same in one launch each. A step has few rows: its time is that of reading the
weights, and of every operation in between that waits for the one before.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nsa.shapes import bind


def project(
    x: Float[Tensor, "rows width"],
    weight: Float[Tensor, "columns width"],
    bias: Float[Tensor, " columns"] | None = None,
    *,
    up: Float[Tensor, "columns width"] | None = None,
    sigmoid_from: int | None = None,
    add: Float[Tensor, "rows columns"] | None = None,
) -> Float[Tensor, "rows columns"]:
    """`weight` times each row of x, and what becomes of the product.

        y = x W^T + bias                              then one of these, if any:
        y = silu(y) * (x up^T)
        y = sigmoid(y) in the columns from `sigmoid_from` on
        y = add + y

    Args:
        x: one row a token.
        weight, bias: of the map.
        up: weight of a second map of x, which the first one gates.
        sigmoid_from: the first column that a sigmoid is applied to.
        add: the residual.

    Returns:
        y in x's dtype, also rounded to it between the map and what follows.

    Raises:
        ValueError: shapes that do not fit.
    """
    given = {"x": (x, "rows width"), "weight": (weight, "columns width")}
    for name, tensor, shape in (
        ("bias", bias, "columns"), ("up", up, "columns width"), ("add", add, "rows columns"),
    ):  # fmt: skip
        if tensor is not None:
            given[name] = (tensor, shape)
    bind("project", **given)
    y = F.linear(x, weight, bias)
    if up is not None:
        return F.silu(y) * F.linear(x, up)
    if sigmoid_from is not None:
        y[:, sigmoid_from:] = y[:, sigmoid_from:].sigmoid()
    return y if add is None else add + y


def rms_norm(
    x: Float[Tensor, "rows width"], weight: Float[Tensor, " width"], eps: float
) -> Float[Tensor, "rows width"]:
    """weight * x / sqrt(mean(x^2) + eps), in fp32 (fp64 for fp64), rounded once.

    Raises:
        ValueError: shapes that do not fit.
    """
    bind("rms_norm", x=(x, "rows width"), weight=(weight, "width"))
    return F.rms_norm(x, weight.shape, weight, eps)
