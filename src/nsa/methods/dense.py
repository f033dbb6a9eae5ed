"""The twins without sparsity: dense attention, all keys or the last `window`, by the fastest that PyTorch has.

    a_i = softmax_j(scale q_i k_j) v_j,    j <= i, j in the document of i, i - j < window

A query head uses the KV head of its group; keys and values are not repeated, and nothing has T x T elements. Packed
documents follow one another through all rows as `cu_seqlens` says, which stays on the device.

| in 16 bit on CUDA | varlen_attn |
|---|---|
| in fp32 on CUDA | FlexAttention |
| in fp64, and on other devices | a document at a time, and of it 128 or `window` queries at a time |
"""

import inspect
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.attention.varlen import varlen_attn

from nsa.shapes import sequence_of

TILE = 128  # queries and keys of a block of FlexAttention's mask
# Where the operation wants to be told so; before, it looks at the shapes.
GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def dense_attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b g t d"],
    v: Float[Tensor, "b g t d"],
    cu_seqlens: Int[Tensor, " documents_plus_1"] | None,
    longest: int | None,
    window: int | None,
    scale: float,
) -> Float[Tensor, "b t h d"]:
    """Rows, each one document, or packed ones; `longest` None: as long as all rows together.

    Raises:
        ValueError: boundaries, read on the host, that are none of these rows.
    """
    b, _, t, _ = q.shape
    in_tiles = q.device.type != "cuda" or q.dtype == torch.float64  # which no kernel takes
    if cu_seqlens is None and in_tiles:
        return by_tiles(q, k, v, window, scale).transpose(1, 2)
    if cu_seqlens is None:
        cu_seqlens, longest = torch.arange(b + 1, device=q.device, dtype=torch.int32) * t, t
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    longest = b * t if longest is None else longest
    if in_tiles:
        out = _by_document(q, k, v, cu_seqlens, window, scale)
    elif has_varlen(q):
        out = varlen(q, k, v, cu_seqlens, cu_seqlens, longest, longest, window, scale)
    else:
        out = _flex(q, k, v, cu_seqlens, window, scale)
    return out.unflatten(0, (b, t))


def has_varlen(query: Tensor) -> bool:
    """Whether FlashAttention, which varlen_attn is, takes these heads on this GPU."""
    return (
        query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 256
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def varlen(
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
    document = sequence_of(cu_seqlens, tokens)

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
    outs = [by_tiles(*one, window=window, scale=scale) for one in documents if one[0].shape[2]]
    return torch.cat(outs, dim=2)[0].transpose(0, 1)


def by_tiles(
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
