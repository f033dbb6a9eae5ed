"""Sparse attention of this rank's queries over sequences that several ranks hold.

Each of a rank's two chunks is one call of the method's function: its queries are the last n of the tokens up to its
end. NSA's compressed keys and values are made by the rank that holds a block's last token; InfLLM-V2's pooled keys are
means of what is gathered anyway, and every rank takes them itself.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from nsa.config import InfLLMv2Config
from nsa.distributed.context import from_the_first
from nsa.distributed.layout import ContextLayout
from nsa.functional import native_sparse_attention
from nsa.methods.infllm_v2 import infllm_v2_attention
from nsa.streams import Branches

# Blocks of keys and of values, [b, c, g, l, d], and rotary factors -> compressed keys, rotated, and values.
Compress = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@torch.compiler.disable  # what ranks say to each other is not traced
def context_parallel_attention(
    q: Float[Tensor, "b t h d"],
    tokens: Branches,
    gates: Float[Tensor, "b t h 3"],
    layout: ContextLayout,
    compress: Compress,
) -> Float[Tensor, "b t h e"]:
    """What `native_sparse_attention` of all tokens gives for this rank's.

    Args:
        q: of this rank's tokens, rotated.
        tokens: their keys and values; keys rotated, but for those of the compressed branch.
        gates: in (0, 1), one per query, head and branch.
        layout: where the tokens lie.
        compress: phi of keys and of values.
    """
    windows, config = layout.context.windows, layout.config
    k_raw, v_raw, k, v, k_win, v_win = tokens.tensors
    halos = tuple(chunk.halo for chunk in layout.chunks)
    k_halos, v_halos = windows(k_raw, halos), windows(v_raw, halos)  # little, and what follows waits for it
    on_their_way = [layout.context.start(x) for x in (k, v)]  # while blocks are compressed
    k_cmp, v_cmp = _compressed(k_halos, v_halos, layout, compress)
    keys = tuple(chunk.keys for chunk in layout.chunks)
    ks, vs = (windows(x, keys, started=started) for x, started in zip((k, v), on_their_way, strict=True))
    if k_win is k and v_win is v:
        ks_win, vs_win = ks, vs
    else:
        spans = layout.context.zigzag.spans(q.shape[1] * layout.context.size)
        near = tuple((max(0, start - config.window_size + 1), stop) for start, stop in spans)
        ks_win, vs_win = windows(k_win, near), windows(v_win, near)
        if layout.is_packed:  # whose lengths are those of all keys; before the window are zeros, which nobody reads
            ks_win, vs_win = from_the_first(ks_win, near), from_the_first(vs_win, near)
    n = q.shape[1] // 2
    outs = [
        native_sparse_attention(
            q_chunk, ks[i], vs[i], gates_chunk, config, k_cmp=k_cmp[i], v_cmp=v_cmp[i], k_win=ks_win[i],
            v_win=vs_win[i], cu_seqlens_q=chunk.cu_seqlens_q, cu_seqlens_k=chunk.cu_seqlens_k,
            max_seqlen_k=layout.max_seqlen, nonnegative_gates=True,
        )
        for i, (chunk, q_chunk, gates_chunk) in enumerate(
            zip(layout.chunks, q.split(n, 1), gates.split(n, 1), strict=True)
        )
    ]  # fmt: skip
    return torch.cat(outs, 1)


@torch.compiler.disable
def context_parallel_infllm_v2(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b t g d"],
    v: Float[Tensor, "b t g e"],
    layout: ContextLayout,
    config: InfLLMv2Config,
) -> Float[Tensor, "b t h e"]:
    """What `infllm_v2_attention` of all tokens gives for this rank's: q, k (rotated) and v are theirs."""
    context, keys = layout.context, tuple(chunk.keys for chunk in layout.chunks)
    on_their_way = [context.start(x) for x in (k, v)]
    ks, vs = (context.windows(x, keys, started=started) for x, started in zip((k, v), on_their_way, strict=True))
    outs = [
        infllm_v2_attention(
            q_chunk, ks[i], vs[i], config, cu_seqlens_q=chunk.cu_seqlens_q, cu_seqlens_k=chunk.cu_seqlens_k
        )
        for i, (chunk, q_chunk) in enumerate(zip(layout.chunks, q.chunk(2, 1), strict=True))
    ]
    return torch.cat(outs, 1)


def _compressed(
    k_halos: tuple[Tensor, ...], v_halos: tuple[Tensor, ...], layout: ContextLayout, compress: Compress
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Compressed keys and values that the queries of each chunk may see, from the first of all."""
    context, config, count = layout.context, layout.config, layout.num_blocks
    parts = [
        compress(chunk.gather(k_halo, count, config), chunk.gather(v_halo, count, config), chunk.cos, chunk.sin)
        for chunk, k_halo, v_halo in zip(layout.chunks, k_halos, v_halos, strict=True)
    ]
    ends = [stop for _, stop in (chunk.keys for chunk in layout.chunks)]
    seen = tuple(
        (0, stop // config.compress_stride if layout.is_packed else config.num_compressed_blocks(stop)) for stop in ends
    )
    k_cmp, v_cmp = (torch.cat(both, 1) for both in zip(*parts, strict=True))
    return context.windows(k_cmp, seen, layout.order), context.windows(v_cmp, seen, layout.order)
