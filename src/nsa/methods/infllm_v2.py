"""InfLLM-V2 as a function: a dense layer's q, k and v, of whose keys each query reads some blocks and no more."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nsa.backend import Backend, resolve
from nsa.cache_tensors import as_computed
from nsa.composed import as_operator, is_traced
from nsa.config import InfLLMv2Config
from nsa.methods.oracle import is_by_mass
from nsa.ops.attend import attend
from nsa.ops.causal_attention import causal_attention, sees_all
from nsa.ops.compress import compress, phi_mean
from nsa.ops.pooled_selection import select_by_mass, select_by_pooled_keys
from nsa.ops.tiled_attention import factor
from nsa.shapes import Sequences, bind, check_queries
from nsa.streams import Blocks, Causal, Stream

OP = "infllm_v2_attention"
DEFAULT = InfLLMv2Config()


def infllm_v2_attention(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b s g d"],
    v: Float[Tensor, "b s g e"],
    config: InfLLMv2Config = DEFAULT,
    *,
    k_pool: Float[Tensor, "b c g d"] | None = None,
    cu_seqlens_q: Int[Tensor, " sequences_plus_1"] | None = None,
    cu_seqlens_k: Int[Tensor, " sequences_plus_1"] | None = None,
    seqlens_k: Int[Tensor, " b"] | None = None,
    scale: float | None = None,
    backend: Backend | None = None,
) -> Float[Tensor, "b t h e"]:
    """Attention of every query to the blocks on its list, in one softmax.

        o_t = sum over p of softmax_p(scale q_t . k_p) v_p,      p <= t, p in a block that t lists
        lists: `nsa.ops.pooled_selection.select_by_pooled_keys`

    A query at position t < max(dense_len, n block_size) lists every block up to its own: this is dense attention, so
    that a dense checkpoint is unchanged up to there. That depends on t alone, not on how long its sequence becomes,
    so that prefill in any chunks and decoding give the same numbers as one forward pass. The choice has no gradient.

    Args:
        q: queries, rotated, the last t of s positions; h is a multiple of g.
        k, v: keys, rotated, and values; of q's dtype and device.
        config: block sizes and counts.
        k_pool: pooled keys of a cache; by default they are made of k: the mean of each kernel_size keys.
        cu_seqlens_q, cu_seqlens_k: packed sequences (b == 1) as in FlashAttention's varlen API; the second only
            where a sequence has more keys than queries.
        seqlens_k: keys of each row, left-aligned, where rows differ; queries are right-aligned, and those at a
            negative position are padding.
        scale: factor of the scores, > 0, d ** -0.5 by default.
        backend: as for `nsa.native_sparse_attention`. The kernels choose and attend, forward and backward, without
            reading a length on the host; with `coarse_lse` the choice is PyTorch's operations, which do.

    Returns:
        [b, t, h, e] in q's dtype; 0 for padding. Every other query sees at least itself.

    Under `torch.autocast` q, k and v are cast to its dtype first, as for PyTorch's own attention.

    Raises:
        ValueError: shapes or lengths that do not fit, in one line; a backend that cannot serve.

    Source: arXiv:2509.24663 section 3, arXiv:2506.07900 section 2 (`docs/methods.md` says where this differs). Tested
    against the fp64 brute force of nsa.testing, and against itself under every split into chunks and steps.
    """
    _check(q, k, v, k_pool, config)
    scale = factor(q, scale)
    device = q.device.type
    is_autocast = device != "meta" and torch.is_autocast_enabled(device)
    q, k, v = as_computed(q, k, v)
    k_pool = None if k_pool is None else as_computed(k_pool)[0]
    _check_lengths(q, k, cu_seqlens_q, cu_seqlens_k, seqlens_k)
    # The sums inside are fp32; autocast would round their terms.
    with torch.autocast(device, enabled=False) if is_autocast else nullcontext():
        on = resolve(q, k, v, scale=scale, backend=backend)
        lengths = [cu_seqlens_q, cu_seqlens_k, seqlens_k]
        if is_traced(q):
            return _operator([q, k, v], [*lengths, k_pool], [*config.sizes, int(on == "triton")], scale)
        return attend_to_listed(q, Stream(k, v, where=Sequences(*lengths)), k_pool, config, scale, on)


def attend_to_listed(
    q: Tensor, raw: Stream, k_pool: Tensor | None, config: InfLLMv2Config, scale: float, on: Backend
) -> Tensor:
    """The steps of the method; `k_pool` None: means of raw's keys."""
    if (s := raw.k.shape[1]) <= config.sees_all:
        if on == "torch" and sees_all(q, raw, s):
            return causal_attention(q, raw.k, raw.v, scale=scale)
        return attend(q, raw, Causal(), scale=scale, backend=on)[0]
    if is_by_mass():
        indices = select_by_mass(q, raw.k, config, sequences=raw.where, scale=scale)
    else:
        indices = _choose(q, raw, k_pool, config, scale, on)
    listed = Blocks(indices, config.block_size, config.blocks.num_local_blocks)
    return attend(q, raw, listed, scale=scale, backend=on)[0]


def _choose(q: Tensor, raw: Stream, k_pool: Tensor | None, config: InfLLMv2Config, scale: float, on: Backend) -> Tensor:
    s, where = raw.k.shape[1], raw.where
    if k_pool is None:
        with torch.no_grad():
            k_pool = compress(raw.k, phi_mean, config.blocks, sequences=where)
    if on == "triton" and not config.coarse_lse:
        from nsa.kernels import pooled_selection  # only where triton is installed

        return pooled_selection.select_by_pooled_keys(q, k_pool, where, config, s, scale)
    return select_by_pooled_keys(q, k_pool, config, num_keys=s, sequences=where, scale=scale)


def _attend(tensors: Sequence[Tensor], others: Sequence[Tensor | None], sizes: list[int], scale: float) -> Tensor:
    (q, k, v), (*lengths, k_pool), (*numbers, on_kernels) = tensors, others, sizes
    raw, config = Stream(k, v, where=Sequences(*lengths)), InfLLMv2Config.from_sizes(numbers)
    return attend_to_listed(q, raw, k_pool, config, scale, "triton" if on_kernels else "torch")


_operator = as_operator("infllm_v2_attention", _attend)


# ---- what the function takes ----


def _check(q: Tensor, k: Tensor, v: Tensor, k_pool: Tensor | None, config: InfLLMv2Config) -> None:
    if not isinstance(config, InfLLMv2Config):
        got = type(config).__name__
        raise ValueError(f"{OP}: config should be an InfLLMv2Config (InfLLMv2Config.from_dict), got {got}")
    tensors = {"q": (q, "b t h d"), "k": (k, "b s g d"), "v": (v, "b s g e")}
    if k_pool is not None:
        tensors["k_pool"] = (k_pool, "b c g d")
    bind(OP, **tensors)
    for name, (x, _) in tensors.items():
        if x.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{OP}: {name} should be of float64, float32, bfloat16 or float16, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{OP}: {name} should be on q's device {q.device}, got {x.device}")


def _check_lengths(q: Tensor, k: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, lengths: Tensor | None) -> None:
    """What shapes and dtypes tell: nothing that would have to ask the device."""
    if k.dtype != q.dtype:
        raise ValueError(f"{OP}: k should have q's dtype {q.dtype}, got {k.dtype}")
    Sequences(cu_q, cu_k, lengths)
    check_queries(OP, (*q.shape[:2], k.shape[1]), cu_q, cu_k, lengths)
