"""Launches a Triton kernel: what Triton does, but finding the compiled kernel again takes a third of the time.

`kernel[grid](...)` works out at every launch, from 20 to 50 arguments, for what the kernel is to be compiled, and looks
that up by a long key. A forward and backward of attention are 18 launches, and at short lengths the device waits for
them. Here the key holds no more than what differs from launch to launch; a compiled kernel is launched by Triton's own
public interface for that (`compiled[grid](...)`).
"""

from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction

# Only the versions whose specialization is known (tests/kernels/test_start.py compares); others launch as ever.
_IS_KNOWN = triton.__version__.startswith(("3.6.", "3.7."))
_WIDE = 1 << 31

_compiled: dict[tuple, tuple[CompiledKernel, tuple]] = {}
_specialized: dict[Any, tuple[bool, ...]] = {}


def start_kernel(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """`kernel[grid](*arguments, **constants)`: arguments in the kernel's order, constants after them and by name."""
    if not _IS_KNOWN or not isinstance(kernel, JITFunction):  # the interpreter's kernels are none
        kernel[grid](*arguments, **constants)
        return
    key = (kernel.fn, _device(arguments[0]), *key_of(kernel, arguments), *constants.values())
    found = _compiled.get(key)
    if found is not None:
        compiled, in_order = found
        compiled[(*grid, 1, 1)](*arguments, *in_order)
        return
    compiled = kernel[grid](*arguments, **constants)
    if isinstance(compiled, CompiledKernel):
        names = kernel.arg_names[len(arguments) :]
        _compiled[key] = compiled, tuple(constants[name] for name in names)


def _device(x: Any) -> torch.device:
    """Of a tensor or a descriptor; it is the current device."""
    return x.device if isinstance(x, Tensor) else x.base.device


def key_of(kernel: Any, arguments: tuple) -> list:
    """What a kernel is compiled for, of its arguments: types, and of some integers and pointers what divides them."""
    specialized = _specialized.get(kernel.fn)
    if specialized is None:
        specialized = _specialized[kernel.fn] = tuple(not parameter.do_not_specialize for parameter in kernel.params)
    return [_key_of(x, special) for x, special in zip(arguments, specialized, strict=False)]


def _key_of(x: Any, special: bool) -> Any:
    return (
        (-_WIDE <= x < _WIDE) + 2 * special * (1 + (x % 16 == 0) + 2 * (x == 1))
        if type(x) is int
        else (x.dtype, x.data_ptr() % 16 == 0)
        if isinstance(x, Tensor)
        else None
        if x is None
        else (x.base.dtype, *x.block_shape)  # a descriptor, whose layout follows from these
        if hasattr(x, "block_shape")
        else tuple(_key_of(one, special) for one in x)
        if type(x) is tuple
        else type(x)
    )


def strides_of(*tensors: Tensor) -> tuple[int, ...]:
    """Of rows, tokens and heads of each, one argument of a kernel; their last dimension is contiguous."""
    return tuple(stride for x in tensors for stride in x.stride()[:3])
