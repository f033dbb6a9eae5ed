"""The model where several ranks hold the sequences: what its layers share, and attention of the twins."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nsa.distributed import ContextParallel
from nsa.distributed.context import from_the_first
from nsa.distributed.layout import ContextLayout, boundaries, check_shard
from nsa.models.configuration import SPARSE
from nsa.models.positions import given_boundaries
from nsa.shapes import packed_positions

TILE = 128  # queries that share a mask


@dataclass(frozen=True)
class TwinContext:
    """Of rows of `total` tokens this rank's two chunks; documents of packed rows begin at `cu_seqlens`."""

    context: ContextParallel
    total: int
    cu_seqlens: Tensor | None
    max_seqlen: int | None


def forward_arguments(
    decoder: Any,
    context: ContextParallel,
    embeds: Tensor,
    position_ids: Tensor | None,
    kwargs: dict[str, Any],
    refused: Mapping[str, Any],
) -> dict[str, Any]:
    """What the decoder's layers need; boundaries of documents are taken out of `kwargs`.

    Raises:
        ValueError: what does not go with context parallelism, or is no part of a rank.
    """
    for name, value in refused.items():
        if value is not None and value is not False:
            raise ValueError(
                f"context parallelism: {name} does not go with it; expected none, and rows without padding"
            )
    bounds, longest = given_boundaries(kwargs)
    if decoder.config.dense_layers:
        raise ValueError(f"context parallelism: expected no dense_layers, got {decoder.config.dense_layers}")
    if decoder.config.attention in SPARSE:
        layout = ContextLayout.of(
            embeds, decoder.rotary, decoder.nsa_config, context,
            cu_seqlens=bounds, max_seqlen=longest, position_ids=position_ids,
        )  # fmt: skip
        # Llama's own rotary factors and mask are for nobody here; any positions do.
        return {"layout": layout, "position_ids": torch.zeros_like(embeds[:1, :, 0], dtype=torch.long)}
    total = check_shard(embeds, context, bounds, position_ids)
    bounds = None if bounds is None else bounds.to(embeds.device)
    if position_ids is None:
        tokens = torch.arange(total, device=embeds.device)
        if bounds is not None:
            tokens = packed_positions(bounds, tokens)
        position_ids = context.zigzag.shard(tokens[None])
    return {"context": TwinContext(context, total, bounds, longest), "position_ids": position_ids}


def whole_count(context: ContextParallel, arguments: Mapping[str, Any]) -> Tensor | int:
    """What the sum of losses is divided by: labels of all ranks, so that their losses add up to the mean.

    Raises:
        ValueError: labels that are not moved yet, for the next token may be another rank's.
    """
    labels = arguments.get("shift_labels")
    if labels is None:
        raise ValueError("context parallelism: expected shift_labels beside labels, as ZigZag.shard_batch makes them")
    given = arguments.get("num_items_in_batch")
    if given is not None:
        return given
    count = (labels != -100).sum()
    dist.all_reduce(count, group=context.group)
    return count


@torch.compiler.disable
def attend_in_context(
    query: Float[Tensor, "b h t d"],
    key: Float[Tensor, "b g t d"],
    value: Float[Tensor, "b g t d"],
    shared: TwinContext,
    window: int | None,
    scaling: float,
    varlen: Any,
) -> Float[Tensor, "b t h d"]:
    """Each chunk's queries are the last of the tokens up to its end; keys and values come from all ranks.

    `varlen` is attention of packed documents by the device's own kernel, or None.
    """
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    spans = shared.context.zigzag.spans(shared.total)
    # Before a window's first key are zeros, which nobody reads.
    seen = tuple((0 if window is None else max(0, start - window + 1), stop) for start, stop in spans)
    ks, vs = (from_the_first(shared.context.windows(x, seen), seen) for x in (k, v))
    outs = []
    for chunk, q_chunk, keys, values in zip(spans, q.chunk(2, 1), ks, vs, strict=True):
        b, t, s = len(q), q_chunk.shape[1], keys.shape[1]
        if shared.cu_seqlens is None:
            rows = torch.arange(b + 1, device=q.device, dtype=torch.int32)
            cu_q, cu_k = rows * t, rows * s
        else:
            cu_q, cu_k = boundaries(shared.cu_seqlens, chunk)
        longest = s if shared.max_seqlen is None else shared.max_seqlen
        flat = (q_chunk.flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1))
        out = (varlen or _by_document)(*flat, cu_q, cu_k, t, longest, window, scaling)
        outs.append(out.unflatten(0, (b, t)))
    return torch.cat(outs, 1)


def _by_document(
    q: Float[Tensor, "t h d"],
    k: Float[Tensor, "s g d"],
    v: Float[Tensor, "s g d"],
    cu_q: Tensor,
    cu_k: Tensor,
    longest_q: int,
    longest_k: int,
    window: int | None,
    scale: float,
) -> Float[Tensor, "t h d"]:
    """Boundaries are read on the host; `TILE` queries at a time."""
    outs = [q[:0] + 0 * (k.sum() + v.sum())]  # a part of the graph whatever the lengths
    for (q0, q1), (k0, k1) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        for first in range(q0, q1, TILE):
            last = min(first + TILE, q1)
            high = k1 - (q1 - last)  # the keys end with the last query's own
            low = k0 if window is None else max(k0, high - (last - first) - window + 1)
            distance = torch.arange(high - (last - first), high, device=q.device)[:, None]
            distance = distance - torch.arange(low, high, device=q.device)
            mask = distance >= 0 if window is None else (distance >= 0) & (distance < window)
            one, keys, values = (x.transpose(0, 1)[None] for x in (q[first:last], k[low:high], v[low:high]))
            out = F.scaled_dot_product_attention(one, keys, values, attn_mask=mask, scale=scale, enable_gqa=True)
            outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)
