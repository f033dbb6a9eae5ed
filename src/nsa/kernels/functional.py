"""`nsa.functional.native_sparse_attention` on the kernels, once it has checked its arguments and filled them in."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from nsa.config import NSAConfig
from nsa.kernels.attention import Layouts, Saved, attention_backward, attention_forward, pairs
from nsa.kernels.library import whole


def native_sparse_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k: Tensor,
    v: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqlens_k: Tensor | None,
    seqlens_win: Tensor | None,
    config: NSAConfig,
    scale: float,
    nonnegative_gates: bool,
    max_seqlen_k: int | None,
) -> Tensor:
    """See `nsa.functional.native_sparse_attention`, which has checked all but the lengths: they stay on the device."""
    keys = (k_cmp, v_cmp, k, v, k_win, v_win)
    lengths = (cu_seqlens_q, cu_seqlens_k, seqlens_k, seqlens_win)
    on_device = [None if x is None else x.to(q.device, torch.int32) for x in lengths]
    if _is_traced(q, *keys, gates):
        return whole(q, *keys, gates, *on_device, config.sizes, scale, nonnegative_gates, max_seqlen_k or 0)[0]
    layouts = Layouts.of(q, k, k_win, *on_device, config, max_seqlen_k or 0)
    return _Attention.apply(q, *keys, gates, layouts, config, scale, nonnegative_gates)


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
    def forward(ctx, q, k_cmp, v_cmp, k, v, k_win, v_win, gates, layouts, config, scale, nonnegative_gates):
        keys = (k_cmp, v_cmp, k, v, k_win, v_win)
        with torch.cuda.device_of(q):
            out, saved = attention_forward(q, *pairs(keys), gates, layouts, config, scale)
        ctx.save_for_backward(q, *keys, gates, *saved.tensors)
        ctx.rest = layouts, config, scale, nonnegative_gates
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        q, *keys, gates = (tensors := ctx.saved_tensors)[:8]
        with torch.cuda.device_of(q):
            dq, d_cmp, d_slc, d_win, d_gates = attention_backward(
                q, *pairs(keys), gates, d_out, Saved.of(tensors[8:]), *ctx.rest
            )
        return dq, *d_cmp, *d_slc, *d_win, d_gates, None, None, None, None
