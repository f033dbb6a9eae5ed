"""InfLLM-V2 (arXiv:2509.24663) in plain loops: the truth for `nsa.methods.infllm_v2`, with no code of it.

One sequence, float64, legend as in `brute_force`. Every function says what one query does.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nsa.config import InfLLMv2Config
from nsa.testing.brute_force import attention
from nsa.testing.brute_force_selection import query_positions


def pooled_keys(k: Float[Tensor, "s g d"], size: int, stride: int) -> tuple[list[int], Float[Tensor, "c g d"]]:
    """Starts of the pooled keys, every `stride` tokens while `size` fit, and the means of k[start : start + size]."""
    starts = list(range(0, k.shape[0] - size + 1, stride))
    means = [k[start : start + size].sum(0) / size for start in starts]
    return starts, torch.stack(means) if means else k[:0]


def logits(
    q: Float[Tensor, " d"], pooled: tuple[list[int], Tensor], size: int, position: int, group: int, scale: float
) -> dict[int, float]:
    """Of one query and head, by the start of each pooled key that ends at or before the query."""
    starts, keys = pooled
    values = (scale * (keys[:, group] @ q)).tolist()
    return {start: x for start, x in zip(starts, values, strict=True) if start + size - 1 <= position}


def block_scores(
    q: Float[Tensor, "t h d"], k: Float[Tensor, "s g d"], config: InfLLMv2Config, scale: float | None = None
) -> Float[Tensor, "t g blocks"]:
    """What every block scores for every query and KV head. No gradient."""
    q, k = q.detach(), k.detach()
    scale = q.shape[2] ** -0.5 if scale is None else scale
    length, heads, size = k.shape[0], q.shape[1] // k.shape[1], config.kernel_size
    fine = pooled_keys(k, size, config.kernel_stride)
    coarse = pooled_keys(k, 4 * size, 4 * config.kernel_stride)
    scores = q.new_zeros(q.shape[0], k.shape[1], math.ceil(length / config.block_size))
    for row, position in enumerate(query_positions(q.shape[0], length)):
        for group in range(k.shape[1]):
            weights: dict[int, float] = {}
            for head in range(group * heads, (group + 1) * heads):
                seen = logits(q[row, head], fine, size, position, group, scale)
                below = logits(q[row, head], coarse, 4 * size, position, group, scale) if config.coarse_lse else {}
                terms = list((below or seen).values())
                lse = max(terms) + math.log(sum(math.exp(x - max(terms)) for x in terms)) if terms else 0.0
                for start, logit in seen.items():
                    weights[start] = weights.get(start, 0.0) + math.exp(min(logit - lse, 80.0))
            for block in range(scores.shape[2]):
                first, last = block * config.block_size, (block + 1) * config.block_size - 1
                touching = [w for start, w in weights.items() if start <= last and start + size > first]
                scores[row, group, block] = max(touching, default=0.0)
    return scores


def window_blocks(config: InfLLMv2Config) -> int:
    return math.ceil(config.window_size / config.block_size)


def listed(scores: list[float], position: int, config: InfLLMv2Config) -> set[int]:
    """The blocks that one query reads."""
    if position < 0:
        return set()
    own, budget = position // config.block_size, config.topk + window_blocks(config)
    if position < config.dense_len or own < budget:
        return set(range(own + 1))
    chosen = set(range(config.init_blocks)) | set(range(own - window_blocks(config), own + 1))
    others = [block for block in range(own + 1) if block not in chosen]
    others.sort(key=lambda block: (-scores[block], block))
    return chosen | set(others[: budget - len(chosen)])


def select_blocks(
    q: Float[Tensor, "t h d"], k: Float[Tensor, "s g d"], config: InfLLMv2Config, width: int, scale: float | None = None
) -> Int[Tensor, "t g width"]:
    """The lists, ascending, -1 in the empty slots."""
    scores = block_scores(q, k, config, scale)
    lists = [
        [sorted(listed(scores[row, group].tolist(), position, config)) for group in range(k.shape[1])]
        for row, position in enumerate(query_positions(q.shape[0], k.shape[0]))
    ]
    padded = [[blocks + [-1] * (width - len(blocks)) for blocks in row] for row in lists]
    return torch.tensor(padded, dtype=torch.int32).view(q.shape[0], k.shape[1], width)


def infllm_v2_attention(
    q: Float[Tensor, "t h d"],
    k: Float[Tensor, "s g d"],
    v: Float[Tensor, "s g e"],
    config: InfLLMv2Config,
    scale: float | None = None,
) -> Float[Tensor, "t h e"]:
    """One softmax over the keys of the listed blocks, up to the query's own."""
    length, scores = k.shape[0], block_scores(q, k, config, scale)
    positions = query_positions(q.shape[0], length)

    def visible(row: int, position: int, group: int) -> list[int]:
        blocks = listed(scores[row, group].tolist(), position, config)
        return [key for key in range(length) if key <= position and key // config.block_size in blocks]

    return attention(q, k, v, positions, visible, scale)[0]
