"""`nsa.functional.native_sparse_attention` on the kernels, once it has checked its arguments and filled them in."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from nsa.config import NSAConfig
from nsa.kernels.attention import Layouts, Saved, attention_backward, attention_forward, pairs
from nsa.kernels.library import whole
from nsa.streams import Branches


def native_sparse_attention(
    q: Tensor, branches: Branches, gates: Tensor, config: NSAConfig, scale: float, nonnegative_gates: bool,
    max_seqlen_k: int | None,
) -> Tensor:  # fmt: skip
    """See `nsa.functional.native_sparse_attention`, which has checked all but the lengths: they stay on the device."""
    keys, longest = branches.tensors, max_seqlen_k or 0
    if _is_traced(q, *keys, gates):
        options = (config.sizes, scale, nonnegative_gates, longest)
        return whole(q, list(keys), gates, branches.lengths, *options)[0]
    rest = Layouts.of(q, branches, longest), config, scale, nonnegative_gates
    return _Attention.apply(rest, q, *keys, gates)


def _is_traced(*tensors: Tensor) -> bool:
    """Whether somebody records operators or is to see them whole: torch.compile, torch.export, fake tensors, modes."""
    return (
        torch.compiler.is_compiling()
        or is_in_torch_dispatch_mode()
        or not all(type(x) is Tensor or type(x) is torch.nn.Parameter for x in tensors)
    )


class _Attention(torch.autograd.Function):
    """`library.whole` without an operator's overhead, which is longer than all of its launches; it also keeps where the
    sequences lie, so that backward does not work it out again."""

    @staticmethod
    def forward(ctx, rest, *tensors):
        q, *keys, gates = tensors
        with torch.cuda.device_of(q):
            out, saved = attention_forward(q, pairs(keys), gates, *rest[:3])
        ctx.save_for_backward(*tensors, *saved.tensors)
        ctx.rest = rest
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        q, *keys, gates = (tensors := ctx.saved_tensors)[:8]
        with torch.cuda.device_of(q):
            return None, *attention_backward(q, pairs(keys), gates, d_out, Saved.of(tensors[8:]), *ctx.rest)
