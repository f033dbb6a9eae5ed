"""`nsa.functional.native_sparse_attention` on the kernels, once the keys and values are compressed."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from nsa.config import NSAConfig
from nsa.kernels.attention import Layouts, Saved, attention_backward, attention_forward, pairs
from nsa.kernels.library import whole
from nsa.shapes import bind


def native_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    config: NSAConfig,
    *,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_win: Tensor | None = None,
    v_win: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqlens_k: Tensor | None = None,
    seqlens_win: Tensor | None = None,
    scale: float | None = None,
    nonnegative_gates: bool = False,
    max_seqlen_k: int | None = None,
) -> Tensor:
    """See `nsa.functional.native_sparse_attention`. Shapes are checked; lengths stay on the device and are trusted.

    Raises:
        ValueError: shapes that do not fit, or tensors that the kernels do not take.
    """
    if k_win is None or v_win is None:
        k_win, v_win, seqlens_win = k, v, seqlens_k
    if scale is None:
        scale = q.shape[-1] ** -0.5
    keys = (k_cmp, v_cmp, k, v, k_win, v_win)
    lengths = (cu_seqlens_q, cu_seqlens_k, seqlens_k, seqlens_win)
    _check(q, *keys, gates, *lengths, config)
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


def _check(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, k: Tensor, v: Tensor, k_win: Tensor, v_win: Tensor, gates: Tensor,
    cu_q: Tensor | None, cu_k: Tensor | None, lengths: Tensor | None, lengths_win: Tensor | None, config: NSAConfig,
) -> None:  # fmt: skip
    """What shapes alone can tell: the kernels would read past the end of tensors that are too short."""
    op = "native_sparse_attention"
    sizes = bind(
        op,
        q=(q, "b t h d"), k=(k, "b s g d"), v=(v, "b s g e"), gates=(gates, "b t h 3"),
        k_cmp=(k_cmp, "b c g d"), v_cmp=(v_cmp, "b c g e"), k_win=(k_win, "b u g d"), v_win=(v_win, "b u g e"),
    )  # fmt: skip
    b, t, s, c, s_win = (sizes[letter] for letter in "btscu")
    for name, x in (("seqlens_k", lengths), ("seqlens_win", lengths_win)):
        if x is not None and x.shape[0] != b:
            raise ValueError(f"{op}: {name} should have shape [b={b}], got {list(x.shape)}")
    if cu_q is not None:
        if b != 1:
            raise ValueError(f"{op}: packed sequences should come with b = 1, got b = {b}")
        if cu_k is not None and len(cu_q) != len(cu_k):
            raise ValueError(
                f"{op}: cu_seqlens_q and cu_seqlens_k should name as many sequences, "
                f"got {len(cu_q) - 1} and {len(cu_k) - 1}"
            )
        if s_win != s or (cu_k is None and s != t):
            raise ValueError(f"{op}: cu_seqlens should end at t and s, the window's keys alike; got {t}, {s}, {s_win}")
        return
    expected = config.num_compressed_blocks(s)
    if c != expected if lengths is None else c < expected:
        raise ValueError(f"{op}: expected {expected} compressed blocks for {s} keys, got {c}")
    for length, given in ((s, lengths), (s_win, lengths_win)):
        if given is None and t > length:
            raise ValueError(f"{op}: the queries are the last t of s positions: expected t <= s, got {t} and {length}")
