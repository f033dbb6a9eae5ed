"""`nsa.functional.native_sparse_attention` on the kernels, once the keys and values are compressed."""

from torch import Tensor

from nsa.config import NSAConfig
from nsa.kernels.library import sizes_of, whole


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
) -> Tensor:
    """See `nsa.functional.native_sparse_attention`. Gates should not be negative where gradients are wanted."""
    if k_win is None or v_win is None:
        k_win, v_win, seqlens_win = k, v, seqlens_k
    if scale is None:
        scale = q.shape[-1] ** -0.5
    keys = (k_cmp, v_cmp, k, v, k_win, v_win)
    lengths = (cu_seqlens_q, cu_seqlens_k, seqlens_k, seqlens_win)
    return whole(q, *keys, gates, *lengths, sizes_of(config), scale)[0]
