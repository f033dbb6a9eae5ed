"""Which implementation computes an operation: PyTorch, on any device and dtype, or the Triton kernels.

`auto` takes the kernels for the CUDA tensors that they support, and PyTorch for everything else; asking for `triton`
where they cannot serve is an error that says why. A call's own `backend` goes before `use_backend`.
"""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor

Backend = Literal["auto", "torch", "triton"]

# Head widths are padded to a power of two inside the kernels; past this a tile no longer fits.
MAX_HEAD_DIM = 256
MAX_GROUP = 32
# Groups of up to so many heads attend by blocks of keys; the parts that their queries get take so many bytes at a time.
SMALL_GROUP = 4
PARTS_BYTES = 640 << 20
MIN_CAPABILITY = (8, 0)

try:
    _HAS_TRITON = importlib.util.find_spec("triton") is not None
except ModuleNotFoundError:
    _HAS_TRITON = False
_requested: Backend = "auto"


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Within the `with` block, compute with this backend; one setting for all threads.

    Raises:
        ValueError: an unknown backend.
    """
    global _requested
    before, _requested = _requested, _known(backend)
    try:
        yield
    finally:
        _requested = before


def resolve(
    q: Tensor, *keys_and_values: Tensor, scale: float | None = None, backend: Backend | None = None
) -> Literal["torch", "triton"]:
    """The backend for these tensors, [b, t, h, d] and [b, s, g, d or e]; `backend` None asks `use_backend`.

    Raises:
        ValueError: an unknown backend; or `triton` was asked for and cannot serve, with the reason.
    """
    backend = _requested if backend is None else _known(backend)
    if backend == "torch":
        return "torch"
    reason = why_not_triton(q, *keys_and_values, scale=scale)
    if reason is None:
        return "triton"
    if backend == "triton":
        raise ValueError(f"backend 'triton' cannot serve: {reason}")
    return "torch"


def _known(backend: Backend) -> Backend:
    if backend not in get_args(Backend):
        raise ValueError(f"backend should be 'auto', 'torch' or 'triton', got {backend!r}")
    return backend


def why_not_triton(q: Tensor, *keys_and_values: Tensor, scale: float | None = None) -> str | None:
    """Why the kernels cannot take these tensors, or None where they can."""
    tensors = (q, *keys_and_values)
    if not _HAS_TRITON:
        return "triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not interpreted:
        if any(x.device.type != "cuda" for x in tensors):
            return f"expected tensors on a CUDA device, got {q.device}"
        capability = torch.cuda.get_device_capability(q.device)
        if capability < MIN_CAPABILITY:
            return "expected compute capability 8.0 or later, got {}.{}".format(*capability)
    if any(x.dim() != 4 for x in tensors):
        return f"expected tensors of four dimensions, got {[x.dim() for x in tensors]}"
    dtypes = {x.dtype for x in tensors}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.bfloat16, torch.float16}:
        return f"expected one dtype of float32, bfloat16 or float16, got {sorted(map(str, dtypes))}"
    for width in {x.shape[3] for x in tensors}:
        if width % 8 or not 8 <= width <= MAX_HEAD_DIM:
            return f"expected head dims that are multiples of 8 up to {MAX_HEAD_DIM}, got {width}"
    group = q.shape[2] // max(1, keys_and_values[0].shape[2])
    if group > MAX_GROUP:
        return f"expected at most {MAX_GROUP} query heads to a KV head, got {group}"
    if scale is not None and scale <= 0:
        return f"expected scale > 0, got {scale}"
    return None
