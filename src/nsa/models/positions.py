"""What position_ids say: where packed sequences begin, and whether a cache would count alike."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from nsa.models.cache import NSALlamaCache
from nsa.modules.token_layout import last_columns


def given_boundaries(kwargs: dict[str, Any]) -> tuple[Tensor | None, int | None]:
    """cu_seqlens of packed sequences and the longest's length under transformers' names, taken out of `kwargs`."""
    for name in ("cu_seq_lens_k", "max_length_k"):
        kwargs.pop(name, None)
    return kwargs.pop("cu_seq_lens_q", None), kwargs.pop("max_length_q", None)


@torch.compiler.disable
def packed_boundaries(
    position_ids: Int[Tensor, "_ t"], mask: Tensor | None, b: int, t: int
) -> tuple[Int[Tensor, " sequences_plus_1"] | None, int | None]:
    """cu_seqlens of packed sequences, through all rows, and the longest's length; None where each row is one sequence.

    A sequence begins wherever a position is not the one before it plus 1 (as transformers has it, whatever the first
    position is). Padding that `mask` names is a sequence of its own. It waits for the device and cuts a compiled graph
    in two; whoever gives `cu_seq_lens_q` spares both.
    """
    if position_ids.dim() != 2 or tuple(position_ids.shape) not in ((b, t), (1, t)):
        raise ValueError(f"position_ids should have shape [b={b} or 1, t={t}], got {list(position_ids.shape)}")
    restarts = position_ids.expand(b, t).diff(dim=1) != 1
    if mask is not None:
        is_token = last_columns(mask, b, t).to(restarts.device)
        restarts = restarts & is_token[:, 1:] & is_token[:, :-1]
    if not bool(restarts.any()):
        return None, None
    if mask is not None:
        restarts = restarts | (is_token.diff(dim=1) != 0)
    starts = torch.cat([restarts.new_ones(b, 1), restarts], dim=1).flatten().nonzero().flatten()
    cu_seqlens = torch.cat([starts, starts.new_tensor([b * t])]).to(torch.int32)
    return cu_seqlens, int(cu_seqlens.diff().max())


def follow_each_other(position_ids: Tensor | None, mask: Tensor | None) -> bool:
    """Whether the tokens of every row are at 0, 1, 2, .., as a new cache would count them."""
    if position_ids is None:
        return True
    b, t = position_ids.shape if mask is None else (mask.shape[0], position_ids.shape[1])
    return _count_from(0, position_ids.expand(b, t), mask)


def check_positions(position_ids: Tensor | None, cache: NSALlamaCache, mask: Tensor | None, t: int) -> None:
    """ValueError where the positions of t new columns are not those that follow the cache's tokens."""
    if position_ids is None:
        return
    first = cache.caches[0].lengths or [0]
    b = len(first) if mask is None else mask.shape[0]
    if position_ids.dim() != 2 or (tuple(position_ids.shape) not in ((b, t), (1, t)) and len(first) == b):
        raise ValueError(f"position_ids should have shape [b={b} or 1, t={t}], got {list(position_ids.shape)}")
    b = max(b, position_ids.shape[0])
    start = torch.tensor(first if len(first) == b else first * b, device=position_ids.device)[:, None]
    if not _count_from(start, position_ids.expand(b, t), mask):
        raise ValueError(
            "NSALlamaModel: over a cache position_ids should go on from its lengths, "
            f"{first[:8]}{' and more' if len(first) > 8 else ''}; leave them out, or go without a cache"
        )


def _count_from(first: Tensor | int, position_ids: Int[Tensor, "b t"], mask: Tensor | None) -> bool:
    b, t = position_ids.shape
    if mask is None:
        return bool((position_ids == first + torch.arange(t, device=position_ids.device)).all())
    is_token = last_columns(mask, b, t).to(position_ids.device)
    return bool(((position_ids == first + is_token.cumsum(1) - 1) | ~is_token).all())
