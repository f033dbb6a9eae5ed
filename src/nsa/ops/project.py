"""One linear map of a decoding step, with what a decoder layer does right before and right after it.

What the kernel of `nsa.kernels.project` does, in PyTorch. A step has few rows: all of its time is that of reading the
weights, and of every kernel in between that waits for the one before.
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
    norm: Float[Tensor, " width"] | None = None,
    eps: float = 0.0,
    up: Float[Tensor, "columns width"] | None = None,
    sigmoid_from: int | None = None,
    add: Float[Tensor, "rows columns"] | None = None,
) -> Float[Tensor, "rows columns"]:
    """`weight` times each row of x, between a norm and what becomes of the product.

        z = norm * x / sqrt(mean(x^2) + eps)          or x, where there is no norm
        y = z W^T + bias                              then one of these, if any:
        y = silu(y) * (z up^T)
        y = sigmoid(y) in the columns from `sigmoid_from` on
        y = add + y

    Args:
        x: one row a token.
        weight, bias: of the map.
        norm, eps: weight and epsilon of an RMS norm in front.
        up: weight of a second map of z, which the first one gates.
        sigmoid_from: the first column that a sigmoid is applied to.
        add: the residual.

    Returns:
        y in x's dtype, also rounded to it between the map and what follows.

    Raises:
        ValueError: shapes that do not fit.
    """
    given = {"x": (x, "rows width"), "weight": (weight, "columns width")}
    for name, tensor, shape in (
        ("bias", bias, "columns"), ("norm", norm, "width"), ("up", up, "columns width"), ("add", add, "rows columns"),
    ):  # fmt: skip
        if tensor is not None:
            given[name] = (tensor, shape)
    bind("project", **given)
    z = x if norm is None else F.rms_norm(x, norm.shape, norm, eps)
    y = F.linear(z, weight, bias)
    if up is not None:
        return F.silu(y) * F.linear(z, up)
    if sigmoid_from is not None:
        y[:, sigmoid_from:] = y[:, sigmoid_from:].sigmoid()
    return y if add is None else add + y
