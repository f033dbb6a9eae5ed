"""The twins in transformers: dense attention and attention over a window as it calls them, and their masks.

| | dense | window |
|---|---|---|
| rows, padding, keys of a cache | scaled_dot_product_attention | the same up to a window's length, then as packed |
| packed | `nsa.methods.dense` | `nsa.methods.dense` with a window |
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
    sliding_window_overlay,
)

from nsa.methods import dense
from nsa.models.configuration import NSALlamaConfig
from nsa.models.context import TwinContext, attend_in_context
from nsa.shapes import packed_positions


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
        position_ids = packed_positions(bounds, tokens).view(b, t)
    return {
        "position_ids": position_ids, "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds,
        "max_length_q": longest, "max_length_k": longest,
    }  # fmt: skip


def attend_dense(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """An attention function of transformers."""
    return _attend(module, *args, window=None, **kwargs)


def attend_window(module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
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
    if context is not None:
        return _in_context(query, key, value, context, window, scaling, dropout), None
    if cu_seq_lens_q is None and (window is None or attention_mask is not None or query.shape[2] <= window):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if dropout:
        raise ValueError(f"attention_dropout: expected 0 for packed rows and for windows, got {dropout}")
    query, key, value = (_in_dtype_of_autocast(x) for x in (query, key, value))
    return dense.dense_attention(query, key, value, cu_seq_lens_q, max_length_q, window, scaling), None


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
    varlen = dense.varlen if query.device.type == "cuda" and dense.has_varlen(query) else None
    return attend_in_context(query, key, value, context, window, scale, varlen)


def _in_dtype_of_autocast(x: Tensor) -> Tensor:
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x
