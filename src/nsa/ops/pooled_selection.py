"""Which blocks each query of InfLLM-V2 reads: keys pooled by their mean, only to choose (arXiv:2509.24663).

No gradient flows through the choice, and pooled keys have no values.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from nsa.config import InfLLMv2Config
from nsa.ops.compressed_attention import compressed_stream, parts_of
from nsa.ops.selection import top_blocks
from nsa.ops.tiles import accumulation_dtype, tile_elements, without_autocast
from nsa.shapes import UNIFORM, Part, Sequences, bind

# Queries that are scored together; more would mostly add keys that the first of them do not see.
MAX_QUERIES = 256
# Keys pooled so many times as coarsely approximate the log-sum-exp of the others.
COARSER = 4
# A key's weight relative to that approximation may be any; exponents above this one count as this one.
LARGEST_EXPONENT = 80.0


@torch.no_grad()
def select_by_pooled_keys(
    q: Float[Tensor, "b t h d"],
    k_pool: Float[Tensor, "b c g d"],
    config: InfLLMv2Config,
    *,
    num_keys: int,
    sequences: Sequences = UNIFORM,
    scale: float | None = None,
) -> Int[Tensor, "b t g n"]:
    """The blocks that each query reads, one list a KV head.

    A query at position t < max(dense_len, n block_size) lists every block up to its own. Any other lists n blocks: the
    first `init_blocks`, its own and those before it that the window touches, and the best others by `pooled_scores`.

    Args:
        q: queries, the last t of s positions (or as `sequences` says).
        k_pool: means of rotated keys (`nsa.ops.compress.compress` with `phi_mean`), block i of the tokens
            [i kernel_stride, i kernel_stride + kernel_size).
        config: block sizes and counts.
        num_keys: s, the number of keys behind k_pool.
        sequences: where the sequences lie; packed pooled keys follow one another in the same order.
        scale: factor of the scores, d ** -0.5 by default.

    Returns:
        block_indices: int32, ascending, no repeats, -1 last; all -1 for padding. Of equal scores the lower index wins;
        neighbouring blocks share a pooled key, so equal scores are common. A weight that is NaN counts as 0. The width
        is `config.list_width(num_keys)`.

    Raises:
        ValueError: shapes that do not fit, or fewer pooled keys than the sequences have.

    Source: arXiv:2509.24663 section 3, arXiv:2506.07900 section 2. Tested against the fp64 brute force of nsa.testing.
    """
    return _select("select_by_pooled_keys", q, k_pool, config, num_keys, sequences, scale)


@torch.no_grad()
def select_by_mass(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b s g d"],
    config: InfLLMv2Config,
    *,
    sequences: Sequences = UNIFORM,
    scale: float | None = None,
) -> Int[Tensor, "b t g n"]:
    """`select_by_pooled_keys` where the scores are what a block gets of the dense attention: every key is read.

        score[j] = sum over the heads h of the group, p in block j of exp(scale q[h] . k[p] - lse[h]),      p <= t

    Args, Returns, Raises: as there, of the keys themselves. Tested against loops in fp64.
    """
    tokens = replace(config, kernel_size=1, kernel_stride=1, coarse_lse=False)
    return _select("select_by_mass", q, k, tokens, k.shape[1], sequences, scale, by_mass=True)


def _select(
    op: str, q: Tensor, k_pool: Tensor, config: InfLLMv2Config, num_keys: int, sequences: Sequences,
    scale: float | None, by_mass: bool = False,
) -> Tensor:  # fmt: skip
    b, t, *_, g = bind(op, q=(q, "b t h d"), k_pool=(k_pool, "b c g d")).values()
    width = config.list_width(num_keys)
    slots = torch.arange(width, device=q.device, dtype=torch.int32)
    block_indices = q.new_full((b, g, t, width), -1, dtype=torch.int32)
    for part in parts_of(q, compressed_stream(k_pool, k_pool, config.blocks, sequences, num_keys)):
        first, few = (min(max(0, x - part.first_position), part.num_queries) for x in (0, config.sees_all))
        own = _positions(part, first, few, q.device) // config.block_size
        chosen = slots.where(slots <= own[:, None], -1)
        block_indices[part.rows, :, part.q_start + first : part.q_start + few] = chosen
        for queries, positions, scores in _scored(op, q, k_pool, part, few, config, scale, by_mass):
            chosen = top_blocks(scores, positions, config.blocks)
            block_indices[part.rows, :, queries] = F.pad(chosen, (0, width - chosen.shape[-1]), value=-1)
    return block_indices.transpose(1, 2)


@torch.no_grad()
def pooled_scores(
    q: Float[Tensor, "b t h d"],
    k_pool: Float[Tensor, "b c g d"],
    config: InfLLMv2Config,
    *,
    num_keys: int,
    sequences: Sequences = UNIFORM,
    scale: float | None = None,
) -> Float[Tensor, "b t g blocks"]:
    """The score of every block, for looking at: it holds t s / block_size numbers, `select_by_pooled_keys` never does.

        w[h, i]  = exp(scale q[h] . k_pool[i] - lse[h])          over the pooled keys that end at or before the query
        score[j] = max over i of sum over the heads h of the group of w[h, i]     for the pooled keys that touch block j

    lse is the log-sum-exp of the same scores; with `coarse_lse` that of the scores of keys pooled over four times as
    many tokens at four times the stride, where the query sees any such key.

    Args, Raises: those of `select_by_pooled_keys`.

    Returns:
        Scores, fp32 (fp64 for fp64 inputs); 0 for blocks of which a query sees no pooled key, and for padding. The
        number of blocks is that of the longest sequence.
    """
    op = "pooled_scores"
    b, t, *_, g = bind(op, q=(q, "b t h d"), k_pool=(k_pool, "b c g d")).values()
    parts = list(parts_of(q, compressed_stream(k_pool, k_pool, config.blocks, sequences, num_keys)))
    blocks = config.blocks.num_selection_blocks(max((part.num_keys for part in parts), default=0))
    found = q.new_zeros((b, g, t, blocks), dtype=accumulation_dtype(q.dtype))
    for part in parts:
        padding = min(max(0, -part.first_position), part.num_queries)
        for queries, _, scores in _scored(op, q, k_pool, part, padding, config, scale):
            found[part.rows, :, queries, : scores.shape[-1]] = scores[..., :blocks]
    return found.transpose(1, 2)


def _scored(
    op: str, q: Tensor, k_pool: Tensor, part: Part, first: int, config: InfLLMv2Config, scale: float | None,
    by_mass: bool = False,
) -> Iterator[tuple[slice, Tensor, Tensor]]:  # fmt: skip
    """Columns, positions and scores [b, g, queries, blocks] of the part's queries from its `first` on, a run a time."""
    count = config.blocks.num_compressed_blocks(part.num_keys)
    fine = k_pool[part.rows, part.c_start : part.c_start + count].to(accumulation_dtype(q.dtype)).transpose(1, 2)
    if fine.shape[2] < count:
        raise ValueError(f"{op}: {part.num_keys} keys need {count} pooled keys, got {fine.shape[2]}")
    rows, groups = fine.shape[:2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    while first < part.num_queries:
        seen = config.blocks.num_visible_compressed_blocks(part.first_position + first)
        room = max(1, 4 * tile_elements() // (rows * q.shape[2] * (seen + 1)))
        last = min(first + min(room, MAX_QUERIES), part.num_queries)
        positions = _positions(part, first, last, q.device)
        queries = slice(part.q_start + first, part.q_start + last)
        keys = fine[:, :, : config.blocks.num_visible_compressed_blocks(part.first_position + last - 1)]
        # [rows, g, queries, heads, d], and weights over the pooled keys
        of_group = q[part.rows, queries].unflatten(2, (groups, -1)).transpose(1, 2).to(fine.dtype) * scale
        yield queries, positions, _to_blocks(_weights(of_group, keys, positions, config), config, by_mass)
        first = last


def _weights(q: Tensor, fine: Tensor, positions: Tensor, config: InfLLMv2Config) -> Tensor:
    """[b, g, queries, c]: what each pooled key weighs, summed over the heads of the group; 0 where it is not seen."""
    scores = _visible_scores(q, fine, positions, config, 1)
    lse = scores.logsumexp(-1, keepdim=True)
    if config.coarse_lse:
        # A coarse key is the mean of the fine ones that stand side by side in it.
        apart, count = config.kernel_size // config.kernel_stride, fine.shape[2]
        starts = range(0, max(0, count - (COARSER - 1) * apart), COARSER)
        places = torch.tensor(list(starts), device=q.device, dtype=torch.long)
        parts = [fine[:, :, places + m * apart] for m in range(COARSER)]
        coarse = torch.stack(parts).mean(0)
        approximate = _visible_scores(q, coarse, positions, config, COARSER).logsumexp(-1, keepdim=True)
        lse = approximate.where(approximate != -torch.inf, lse)
    weights = scores.sub_(lse).clamp_(max=LARGEST_EXPONENT).exp_()
    return weights.sum(3).nan_to_num(0.0)


@without_autocast
def _visible_scores(q: Tensor, keys: Tensor, positions: Tensor, config: InfLLMv2Config, times: int) -> Tensor:
    """[b, g, queries, heads, c], -inf for keys, pooled `times` as coarsely, that end after the query."""
    scores = (q.flatten(2, 3) @ keys.transpose(-1, -2)).unflatten(2, q.shape[2:4])
    starts = torch.arange(keys.shape[2], device=q.device) * (times * config.kernel_stride)
    hidden = starts + times * config.kernel_size - 1 > positions[:, None]
    return scores.masked_fill_(hidden[:, None], -torch.inf)


def _to_blocks(weights: Tensor, config: InfLLMv2Config, by_mass: bool) -> Tensor:
    """Weights [..., c] of pooled keys to the largest, or the sum, [..., blocks] of those that touch each block."""
    # Pooled key i lies on the strides i .. i + before, and per_block strides make a block.
    per_block, before = config.block_size // config.kernel_stride, config.kernel_size // config.kernel_stride - 1
    c = weights.shape[-1]
    blocks = max(1, -(-(c + before) // per_block))
    padded = F.pad(weights, (before, blocks * per_block - c))
    touching = padded.unfold(-1, per_block + before, per_block)
    return touching.sum(-1) if by_mass else touching.amax(-1)


def _positions(part: Part, first: int, last: int, device: torch.device) -> Tensor:
    return torch.arange(first, last, device=device) + part.first_position
