"""The kernel of `nsa.ops.project` against fp64, within the budget that plain PyTorch sets; interpreter and GPU."""

import torch
from torch import Tensor

from nsa.kernels import project as kernels
from nsa.ops.project import project
from nsa.testing import assert_close_to_fp64

# What stands before and behind the products of a decoder layer, and nothing.
USES = {
    "alone": (),
    "inputs": ("bias", "norm", "sigmoid_from"),
    "mlp": ("norm", "up"),
    "output": ("add",),
    "output with bias": ("bias", "add"),
}


def tensors(rows: int, width: int, columns: int, use: str, dtype: torch.dtype, device: str) -> dict:
    shapes = {"x": (rows, width), "weight": (columns, width), "bias": (columns,), "norm": (width,)}
    shapes |= {"up": (columns, width), "add": (rows, columns)}
    given = {name: torch.randn(shapes[name], device=device) for name in ("x", "weight", *USES[use]) if name in shapes}
    given["x"] *= 3
    for name in {"weight", "up"} & given.keys():
        given[name] *= width**-0.5
    given = {name: x.to(dtype) for name, x in given.items()}
    if "norm" in given:
        given["eps"] = 1e-3
    if "sigmoid_from" in USES[use]:
        given["sigmoid_from"] = columns // 2
    return given


def check_project(rows: int, width: int, columns: int, use: str, dtype: torch.dtype, device: str) -> None:
    given = tensors(rows, width, columns, use, dtype, device)
    wide = {name: x.double() if isinstance(x, Tensor) else x for name, x in given.items()}
    assert kernels.serves(given["x"])
    # Rows of a larger matrix, as the tokens of a view.
    apart = torch.full((rows, width + 16), torch.nan, dtype=dtype, device=device)
    apart[:, :width] = given["x"]
    found = kernels.project(**{**given, "x": apart[:, :width]})
    assert_close_to_fp64(found, project(**given), project(**wide), f"{use}, {rows} rows")
    assert torch.equal(found, kernels.project(**given))
