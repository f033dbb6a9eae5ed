"""Native Sparse Attention as a function: the six steps of the paper, in order, or the kernels that do the same."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nsa.backend import Backend, resolve
from nsa.composed import composed, composed_attention, is_traced
from nsa.config import NSAConfig
from nsa.ops.compress import compress, phi_mean
from nsa.shapes import Sequences

DEFAULT = NSAConfig()


def native_sparse_attention(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b s g d"],
    v: Float[Tensor, "b s g e"],
    gates: Float[Tensor, "b t h 3"],
    config: NSAConfig = DEFAULT,
    *,
    k_cmp: Float[Tensor, "b c g d"] | None = None,
    v_cmp: Float[Tensor, "b c g e"] | None = None,
    k_win: Float[Tensor, "b s_win g d"] | None = None,
    v_win: Float[Tensor, "b s_win g e"] | None = None,
    cu_seqlens_q: Int[Tensor, " sequences_plus_1"] | None = None,
    cu_seqlens_k: Int[Tensor, " sequences_plus_1"] | None = None,
    seqlens_k: Int[Tensor, " b"] | None = None,
    seqlens_win: Int[Tensor, " b"] | None = None,
    max_seqlen_k: int | None = None,
    scale: float | None = None,
    nonnegative_gates: bool = False,
    backend: Backend | None = None,
) -> Float[Tensor, "b t h e"]:
    """Compressed, selected and window attention of every query, added by its gates.

        o_t = sum over c in {cmp, slc, win} of g_t^c Attn(q_t, K_t^c, V_t^c)      eq. 5

    The queries are the last t of s positions: t == s in training, t == 1 in decoding, anything between in a chunk
    of prefill.

    Args:
        q: queries of all heads; h is a multiple of g.
        k, v: keys and values of the selection branch.
        gates: one scalar per query, head and branch, in the order cmp, slc, win.
        config: block sizes and counts.
        k_cmp, v_cmp: compressed keys and values; by default the block means of k and v.
        k_win, v_win: keys and values of the window branch, at least the last t + w - 1 of them; by default k and v.
        cu_seqlens_q, cu_seqlens_k: packed sequences (b == 1) as in FlashAttention's varlen API; the second only
            where a sequence has more keys than queries.
        seqlens_k: keys of each row, left-aligned, where rows differ; queries are right-aligned, and those at a
            negative position are padding.
        seqlens_win: the same for k_win, where it holds fewer keys than k.
        max_seqlen_k: for packed sequences, a bound on the keys of the longest, as in FlashAttention's varlen API. The
            kernels trust it and spare the selection what no sequence reaches; the PyTorch operations check it.
        scale: factor of the scores, d ** -0.5 by default.
        nonnegative_gates: whether no gate is negative, as none from a sigmoid is. The kernels' backward then needs no
            copy of the output's gradient for each branch; with it a negative gate's gradients are NaN.
        backend: "torch" for the PyTorch operations of `nsa.ops`; "triton" for the kernels (docs/kernels.md says what
            they take), an error where they cannot serve; "auto" for the kernels where they can. By default what
            `nsa.backend.use_backend` says, at first "auto".

    Returns:
        [b, t, h, e] in q's dtype. A branch in which a query sees no key adds 0; padding queries give 0.

    Under `torch.autocast` queries, keys and values are cast to its dtype first, as for PyTorch's own attention. The
    kernels do not read lengths on the host, so nothing waits for the device, and lengths are trusted; the PyTorch
    operations check them.

    Raises:
        ValueError: shapes or lengths that do not fit, in one line that names the step; a backend that cannot serve.

    Source: paper section 3. Tested against the fp64 brute force of nsa.testing, and against itself under every
    split into prefill chunks and decoding steps.
    """
    for pair, one, other in (("k_cmp and v_cmp", k_cmp, v_cmp), ("k_win and v_win", k_win, v_win)):
        if (one is None) != (other is None):
            raise ValueError(f"native_sparse_attention: give {pair} together, got only one of them")
    if cu_seqlens_q is not None and seqlens_win is not None:
        raise ValueError("native_sparse_attention: give either cu_seqlens_q (packed) or seqlens_win (ragged rows)")
    sequences = Sequences(cu_seqlens_q, cu_seqlens_k, seqlens_k)
    if k_win is None or v_win is None:
        k_win, v_win, seqlens_win = k, v, seqlens_k

    device = q.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        q, k, v, k_win, v_win = (_autocast(x, dtype) for x in (q, k, v, k_win, v_win))
        if k_cmp is not None and v_cmp is not None:
            k_cmp, v_cmp = _autocast(k_cmp, dtype), _autocast(v_cmp, dtype)
        # The sums inside are fp32; autocast would round their terms.
        with torch.autocast(device, enabled=False):
            return native_sparse_attention(
                q, k, v, gates, config, k_cmp=k_cmp, v_cmp=v_cmp, k_win=k_win, v_win=v_win,
                cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seqlens_k=seqlens_k, seqlens_win=seqlens_win,
                max_seqlen_k=max_seqlen_k, scale=scale, nonnegative_gates=nonnegative_gates, backend=backend,
            )  # fmt: skip

    if k_cmp is None or v_cmp is None:
        k_cmp = compress(k, phi_mean, config, sequences=sequences)
        v_cmp = compress(v, phi_mean, config, sequences=sequences)
    if resolve(q, k, v, k_cmp, v_cmp, k_win, v_win, scale=scale, backend=backend) == "triton":
        from nsa.kernels.functional import native_sparse_attention as on_kernels  # only where triton is installed

        return on_kernels(
            q, k, v, gates, config, k_cmp=k_cmp, v_cmp=v_cmp, k_win=k_win, v_win=v_win,
            cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seqlens_k=seqlens_k, seqlens_win=seqlens_win,
            scale=scale, nonnegative_gates=nonnegative_gates, max_seqlen_k=max_seqlen_k,
        )  # fmt: skip

    if scale is None:
        scale = q.shape[-1] ** -0.5
    tensors = (q, k_cmp, v_cmp, k, v, k_win, v_win, gates)
    lengths = (cu_seqlens_q, cu_seqlens_k, seqlens_k, seqlens_win)
    if is_traced(q):
        return composed_attention(*tensors, *lengths, config.sizes, scale)
    if cu_seqlens_q is not None and max_seqlen_k is not None:
        longest = int((cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k).diff().max())
        if longest > max_seqlen_k:
            raise ValueError(
                f"native_sparse_attention: max_seqlen_k is {max_seqlen_k}, but a sequence has {longest} keys"
            )
    return composed(*tensors, *lengths, config, scale)


def _autocast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What torch.autocast does with an argument: fp64 stays."""
    return x if x.dtype == torch.float64 else x.to(dtype)
