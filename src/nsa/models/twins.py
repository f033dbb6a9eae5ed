"""Attention of the twins: dense, and over a window, by the fastest that PyTorch has and without a T x T mask.

    a_i = softmax_j(scale q_i k_j) v_j,    j <= i, j in the document of i, i - j < window

A query head uses the KV head of its group; keys and values are not repeated. A row of a batch is one document, unless
it is packed: then documents follow one another through all rows as `cu_seq_lens_q` says, which stays on the device.

| | dense | window |
|---|---|---|
| rows | scaled_dot_product_attention | as packed |
| packed, or rows with a window, in 16 bit on CUDA | varlen_attn | varlen_attn |
| the same in fp32 | FlexAttention | FlexAttention |
| in fp64, and on other devices | a document at a time | and 128 or `window` queries at a time |
| padding, or keys of a cache | scaled_dot_product_attention with transformers' mask | |
"""

import inspect
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.attention.varlen import varlen_attn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
    sliding_window_overlay,
)

from nsa.models.configuration import NSALlamaConfig
from nsa.models.context import TwinContext, attend_in_context

TILE = 128  # queries and keys of a block of FlexAttention's mask
# Where the operation wants to be told so; before, it looks at the shapes.
GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def dense_mask(
    *, q_length: int, kv_length: int, q_offset: int | Tensor = 0, attention_mask: Tensor | None = None, **kwargs: Any
) -> Bool[Tensor, "b 1 t s"] | None:
    """transformers' mask for SDPA, or None where every query sees the keys of its document up to its own."""
    starts = isinstance(q_offset, int) and q_offset == 0 and q_length == kv_length
    if starts and (attention_mask is None or _is_full(attention_mask)):
        return None
    lengths: dict[str, Any] = {"q_length": q_length, "kv_length": kv_length, "q_offset": q_offset}
    return sdpa_mask(attention_mask=attention_mask, **lengths, **kwargs)


def window_mask(
    *, config: NSALlamaConfig, mask_function: Any = causal_mask_function, **kwargs: Any
) -> Bool[Tensor, "b 1 t s"] | None:
    """The same, restricted to the last `window_size` tokens where it is not None; padding among them does not count."""
    assert config.nsa is not None
    size = config.nsa["window_size"]  # as a dictionary has it: torch.compile reads no fields of dataclasses
    padding = prepare_padding_mask(kwargs.get("attention_mask"), kwargs["kv_length"], kwargs.get("kv_offset", 0))
    window = sliding_window_overlay(size) if padding is None else _window_of_tokens(padding.cumsum(-1), size)
    kwargs["allow_is_causal_skip"] = False
    return dense_mask(mask_function=and_masks(mask_function, window), config=config, **kwargs)


def _window_of_tokens(count: Int[Tensor, "b s"], size: int) -> Any:
    def inner(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return count[row, query] - count[row, key] < size

    return inner


def _is_full(attention_mask: Tensor) -> bool:
    """Without padding; a graph that is being compiled cannot ask."""
    return not torch.compiler.is_compiling() and bool(attention_mask.all())


def packing(
    x: Float[Tensor, "b t hidden"],
    position_ids: Int[Tensor, "_ t"] | None,
    mask: Tensor | None,
    cu_seqlens: Int[Tensor, " documents_plus_1"],
    max_seqlen: int | None,
) -> dict[str, Any]:
    """Where the documents of packed rows x begin, under transformers' names; and positions, from 0 in each document.

    Raises:
        ValueError: boundaries that are no list of integers; a mask beside them.
    """
    if mask is not None:
        raise ValueError("cu_seq_lens_q: packed rows have no padding; give it or an attention_mask, not both")
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seq_lens_q should be a 1-D int32 or int64 tensor, got {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        )
    b, t, _ = x.shape
    bounds, longest = cu_seqlens.to(x.device, torch.int32), b * t if max_seqlen is None else int(max_seqlen)
    if position_ids is None:
        tokens = torch.arange(b * t, device=x.device)
        position_ids = (tokens - bounds[_documents(bounds, tokens)]).view(b, t)
    return {
        "position_ids": position_ids, "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds,
        "max_length_q": longest, "max_length_k": longest,
    }  # fmt: skip


def _documents(cu_seqlens: Int[Tensor, " documents_plus_1"], tokens: Int[Tensor, " t"]) -> Int[Tensor, " t"]:
    """Of each token its document; empty ones have none."""
    return torch.searchsorted(cu_seqlens[1:].contiguous(), tokens.to(cu_seqlens.dtype), right=True)


def dense_attention(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """An attention function of transformers."""
    return _attend(module, *args, window=None, **kwargs)


def window_attention(module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """An attention function of transformers, over the last `window_size` keys, the query's own included."""
    return _attend(module, *args, window=module.config.nsa["window_size"], **kwargs)


def _attend(
    module: nn.Module,
    query: Float[Tensor, "b h t d"],
    key: Float[Tensor, "b g s d"],
    value: Float[Tensor, "b g s d"],
    attention_mask: Bool[Tensor, "b 1 t s"] | None,
    *,
    window: int | None,
    scaling: float,
    dropout: float = 0.0,
    cu_seq_lens_q: Int[Tensor, " documents_plus_1"] | None = None,
    max_length_q: int | None = None,
    context: TwinContext | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "b t h d"], None]:
    b, _, t, _ = query.shape
    if context is not None:
        return _in_context(query, key, value, context, window, scaling, dropout), None
    if cu_seq_lens_q is None and (window is None or attention_mask is not None or t <= window):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if dropout:
        raise ValueError(f"attention_dropout: expected 0 for packed rows and for windows, got {dropout}")
    query, key, value = (_in_dtype_of_autocast(x) for x in (query, key, value))
    in_tiles = query.device.type != "cuda" or query.dtype == torch.float64  # which no kernel takes
    if cu_seq_lens_q is None and in_tiles:
        return _by_tiles(query, key, value, window, scaling).transpose(1, 2), None
    if cu_seq_lens_q is None:
        cu_seq_lens_q, max_length_q = torch.arange(b + 1, device=query.device, dtype=torch.int32) * t, t
    run = _by_document if in_tiles else _varlen if _has_varlen(query) else _flex
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    out = run(q, k, v, cu_seq_lens_q, b * t if max_length_q is None else max_length_q, window, scaling)
    return out.unflatten(0, (b, t)), None


def _in_context(
    query: Float[Tensor, "b h t d"],
    key: Float[Tensor, "b g t d"],
    value: Float[Tensor, "b g t d"],
    context: TwinContext,
    window: int | None,
    scale: float,
    dropout: float,
) -> Float[Tensor, "b t h d"]:
    if dropout:
        raise ValueError(f"attention_dropout: expected 0 under context parallelism, got {dropout}")
    query, key, value = (_in_dtype_of_autocast(x) for x in (query, key, value))
    varlen = _varlen_of if query.device.type == "cuda" and _has_varlen(query) else None
    return attend_in_context(query, key, value, context, window, scale, varlen)


def _in_dtype_of_autocast(x: Tensor) -> Tensor:
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def _has_varlen(query: Tensor) -> bool:
    """Whether FlashAttention, which varlen_attn is, takes these heads on this GPU."""
    return (
        query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 256
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _varlen(
    q: Float[Tensor, "t h d"],
    k: Float[Tensor, "t g d"],
    v: Float[Tensor, "t g d"],
    cu_seqlens: Int[Tensor, " documents_plus_1"],
    longest: int,
    window: int | None,
    scale: float,
) -> Float[Tensor, "t h d"]:
    return _varlen_of(q, k, v, cu_seqlens, cu_seqlens, longest, longest, window, scale)


def _varlen_of(
    q: Float[Tensor, "t h d"],
    k: Float[Tensor, "s g d"],
    v: Float[Tensor, "s g d"],
    cu_q: Int[Tensor, " documents_plus_1"],
    cu_k: Int[Tensor, " documents_plus_1"],
    longest_q: int,
    longest_k: int,
    window: int | None,
    scale: float,
) -> Float[Tensor, "t h d"]:
    seen = (-1 if window is None else window - 1, 0)  # keys to the left and to the right of the query's own
    run: Any = varlen_attn  # which returns more if asked to
    return run(q, k, v, cu_q, cu_k, longest_q, longest_k, scale=scale, window_size=seen, **GROUPED)


def _flex(
    q: Float[Tensor, "t h d"],
    k: Float[Tensor, "t g d"],
    v: Float[Tensor, "t g d"],
    cu_seqlens: Int[Tensor, " documents_plus_1"],
    longest: int,
    window: int | None,
    scale: float,
) -> Float[Tensor, "t h d"]:
    mask = block_mask(cu_seqlens, q.shape[0], window)
    rows = (x.transpose(0, 1)[None] for x in (q, k, v))
    attend = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    return attend(*rows, block_mask=mask, scale=scale, enable_gqa=True)[0].transpose(0, 1)


@cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention)


def block_mask(cu_seqlens: Int[Tensor, " documents_plus_1"], t: int, window: int | None) -> BlockMask:
    """FlexAttention's mask of `t` packed tokens, from the document of every token, on their device.

    Documents follow each other, so the first and the last of a tile decide about all pairs of tiles: nothing larger
    than (t / TILE)^2 is computed.
    """
    tokens = torch.arange(t, device=cu_seqlens.device)
    document = _documents(cu_seqlens, tokens)

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (query >= key) & (document[query] == document[key])
        return seen if window is None else seen & (query - key < window)

    first = torch.arange(0, t, TILE, device=tokens.device)
    last = (first + TILE - 1).clamp(max=t - 1)
    begins, ends = document[first], document[last]
    some = (first[:, None] >= first) & (begins[:, None] <= ends)
    every = (
        (first[:, None] > first) & (ends[:, None] == begins) & (first[:, None] + TILE <= t)
    )  # a cut tile is not full
    if window is not None:
        some &= first[:, None] - last < window
        every &= last[:, None] - first < window
    blocks = (*_listed(some & ~every), *_listed(every))
    return BlockMask.from_kv_blocks(*blocks, BLOCK_SIZE=TILE, mask_mod=sees, seq_lengths=(t, t))


def _listed(tiles: Bool[Tensor, "m n"]) -> tuple[Int[Tensor, "1 1 m"], Int[Tensor, "1 1 m n"]]:
    """How many tiles of keys each tile of queries has, and which, in front of the others."""
    order = tiles.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(-1).int()[None, None], order.int()[None, None]


def _by_document(
    q: Float[Tensor, "t h d"],
    k: Float[Tensor, "t g d"],
    v: Float[Tensor, "t g d"],
    cu_seqlens: Int[Tensor, " documents_plus_1"],
    longest: int,
    window: int | None,
    scale: float,
) -> Float[Tensor, "t h d"]:
    """Boundaries are read on the host."""
    ends = cu_seqlens.tolist()
    sizes = [stop - start for start, stop in pairwise(ends)]
    if ends[:1] != [0] or ends[-1] != len(q) or min(sizes) < 0:
        raise ValueError(f"cu_seq_lens_q: expected boundaries from 0 to {len(q)} that do not fall, got {ends}")
    queries, keys, values = (x.transpose(0, 1)[None].split(sizes, dim=2) for x in (q, k, v))
    documents = zip(queries, keys, values, strict=True)
    outs = [_by_tiles(*one, window=window, scale=scale) for one in documents if one[0].shape[2]]
    return torch.cat(outs, dim=2)[0].transpose(0, 1)


def _by_tiles(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b g t d"],
    v: Float[Tensor, "b g t d"],
    window: int | None,
    scale: float,
) -> Float[Tensor, "b h t d"]:
    """One document a row; a mask of at most max(window, TILE) queries and their keys."""
    attend, t = partial(F.scaled_dot_product_attention, scale=scale, enable_gqa=True), q.shape[2]
    if window is None or t <= window:
        return attend(q, k, v, is_causal=True)
    outs, size, start = [], max(window, TILE), 0
    while start < t:  # and not a range, of which torch.compile makes a graph for every t
        stop, first = min(start + size, t), max(0, start - window + 1)
        distance = torch.arange(start, stop, device=q.device)[:, None] - torch.arange(first, stop, device=q.device)
        seen = (distance >= 0) & (distance < window)
        outs.append(attend(q[:, :, start:stop], k[:, :, first:stop], v[:, :, first:stop], attn_mask=seen))
        start += size
    return torch.cat(outs, dim=2)
