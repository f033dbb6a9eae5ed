"""The kernels of `nsa.ops.step` against fp64, within the budget that plain PyTorch sets; interpreter and GPU."""

import torch

from nsa.kernels import step as kernels
from nsa.ops import step as ops
from nsa.testing import assert_close_to_fp64


def check_add_norm(rows: int, width: int, adds: bool, dtype: torch.dtype, device: str) -> None:
    residual, x = (torch.randn(rows, width, device=device).to(dtype) * scale for scale in (30, 3))
    weight = torch.randn(width, device=device).to(dtype)
    given = (residual, x if adds else None, weight)
    plain = ops.add_norm(*given, 1e-2)
    truth = ops.add_norm(*(None if one is None else one.double() for one in given), 1e-2)
    found = kernels.add_norm(*given, 1e-2)
    for name, *three in zip(("total", "norm"), found, plain, truth, strict=True):
        assert_close_to_fp64(*three, f"{name} of {rows} rows of {width}")
    assert torch.equal(found[0], plain[0])


def check_swiglu(rows: int, width: int, dtype: torch.dtype, device: str) -> None:
    both = (torch.randn(rows, 2 * width, device=device) * 4).to(dtype)
    assert_close_to_fp64(kernels.swiglu(both), ops.swiglu(both), ops.swiglu(both.double()), f"{rows} rows of {width}")
