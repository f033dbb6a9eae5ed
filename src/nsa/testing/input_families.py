"""Kinds of input on which attention kernels behave differently; every comparison should see all of them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class InputShape:
    """Sizes of q [b, t, h, d], k [b, s, g, d] and v [b, s, g, e]."""

    b: int = 1
    t: int
    s: int
    h: int
    g: int
    d: int
    e: int


Inputs = tuple[Float[Tensor, "b t h d"], Float[Tensor, "b s g d"], Float[Tensor, "b s g e"]]


def random_inputs(generator: torch.Generator, shape: InputShape) -> Inputs:
    """Independent standard normal q, k, v in float64, on the generator's device."""
    sizes = (
        (shape.b, shape.t, shape.h, shape.d),
        (shape.b, shape.s, shape.g, shape.d),
        (shape.b, shape.s, shape.g, shape.e),
    )
    q, k, v = (torch.randn(size, generator=generator, dtype=torch.float64, device=generator.device) for size in sizes)
    return q, k, v


def peaked_inputs(generator: torch.Generator, shape: InputShape) -> Inputs:
    """Queries ten times as large: most of the softmax on one key."""
    q, k, v = random_inputs(generator, shape)
    return 10 * q, k, v


def near_uniform_inputs(generator: torch.Generator, shape: InputShape) -> Inputs:
    """Queries a hundred times smaller: all probabilities nearly equal, all block scores nearly tied."""
    q, k, v = random_inputs(generator, shape)
    return q / 100, k, v


def tied_inputs(generator: torch.Generator, shape: InputShape) -> Inputs:
    """One key for all positions: exact ties."""
    q, k, v = random_inputs(generator, shape)
    return q, k[:, :1].expand(k.shape).contiguous(), v


def correlated_inputs(generator: torch.Generator, shape: InputShape) -> Inputs:
    """AR(1) along the sequence, coefficient 0.95, unit variance: as in text, neighbours select alike."""
    q, k, v = (_autoregressive(x, 0.95) for x in random_inputs(generator, shape))
    return q, k, v


def _autoregressive(noise: Tensor, coefficient: float) -> Tensor:
    """x[i] = coefficient * x[i - 1] + sqrt(1 - coefficient^2) * noise[i], along dimension 1."""
    x = noise.clone()
    for i in range(1, x.shape[1]):
        x[:, i] = coefficient * x[:, i - 1] + (1 - coefficient**2) ** 0.5 * noise[:, i]
    return x


INPUT_FAMILIES: dict[str, Callable[[torch.Generator, InputShape], Inputs]] = {
    "random": random_inputs,
    "peaked": peaked_inputs,
    "near_uniform": near_uniform_inputs,
    "tied": tied_inputs,
    "correlated": correlated_inputs,
}
