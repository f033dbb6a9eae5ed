"""The kernels of `nsa.ops.step` against fp64, within the budget that plain PyTorch sets; interpreter and GPU."""

import torch
from torch import Tensor

from nsa.kernels import step as kernels
from nsa.ops import step as ops
from nsa.testing import assert_close_to_fp64

# What stands behind the products of a decoder layer, and nothing.
USES = {
    "alone": (),
    "inputs": ("bias", "sigmoid_from"),
    "mlp": ("up",),
    "output": ("add",),
    "output with bias": ("bias", "add"),
}


def check_project(rows: int, width: int, columns: int, use: str, dtype: torch.dtype, device: str) -> None:
    shapes = {"x": (rows, width), "weight": (columns, width), "bias": (columns,), "up": (columns, width)}
    shapes["add"] = (rows, columns)
    given = {
        name: (torch.randn(shapes[name], device=device) * (width**-0.5 if name in ("weight", "up") else 1)).to(dtype)
        for name in ("x", "weight", *USES[use])
        if name in shapes
    }
    if "sigmoid_from" in USES[use]:
        given["sigmoid_from"] = columns // 2
    wide = {name: x.double() if isinstance(x, Tensor) else x for name, x in given.items()}
    found = kernels.project(**{**given, "x": apart(given["x"])})
    assert_close_to_fp64(found, ops.project(**given), ops.project(**wide), f"{use}, {rows} rows")
    assert torch.equal(found, kernels.project(**given))


def check_rms_norm(rows: int, width: int, dtype: torch.dtype, device: str) -> None:
    x, weight = (torch.randn(rows, width, device=device) * 30).to(dtype), torch.randn(width, device=device).to(dtype)
    found, plain = kernels.rms_norm(apart(x), weight, 1e-2), ops.rms_norm(x, weight, 1e-2)
    assert_close_to_fp64(found, plain, ops.rms_norm(x.double(), weight.double(), 1e-2), f"{rows} rows of {width}")


def apart(x: Tensor) -> Tensor:
    """x as columns of a larger matrix, the others NaN."""
    larger = torch.full((len(x), x.shape[1] + 16), torch.nan, dtype=x.dtype, device=x.device)
    larger[:, : x.shape[1]] = x
    return larger[:, : x.shape[1]]
