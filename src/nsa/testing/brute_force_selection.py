"""Which blocks a query selects, in plain loops: where blocks lie, what is visible, eqs. 8 to 11.

One sequence, float64, written from the paper alone; `brute_force` has the legend and the attentions.
Eq. 9 is here twice, from the token ranges that blocks share and from the printed sum, for a test to compare.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nsa.config import NSAConfig


def query_positions(num_queries: int, num_keys: int) -> list[int]:
    """Queries are the last `num_queries` of `num_keys` positions."""
    return [num_keys - num_queries + row for row in range(num_queries)]


def compression_blocks(length: int, config: NSAConfig) -> list[range]:
    """The tokens of each compression block: [i*d, i*d + l), as long as i*d + l <= length."""
    blocks: list[range] = []
    while len(blocks) * config.compress_stride + config.compress_block_size <= length:
        start = len(blocks) * config.compress_stride
        blocks.append(range(start, start + config.compress_block_size))
    return blocks


def visible_compressed(position: int, length: int, config: NSAConfig) -> list[int]:
    """A query sees block i once the block's last token, i*d + l - 1, is not after the query."""
    return [i for i, block in enumerate(compression_blocks(length, config)) if block[-1] <= position]


def num_selection_blocks(length: int, config: NSAConfig) -> int:
    """Blocks of l' tokens; the last one may be incomplete."""
    return math.ceil(length / config.select_block_size)


def importance_by_overlap(p_cmp: list[float], num_blocks: int, config: NSAConfig) -> list[float]:
    """Eq. 9 by what it means: p_cmp[i] counts as often as blocks i and j share d tokens."""
    p_slc = []
    for j in range(num_blocks):
        selection = range(j * config.select_block_size, (j + 1) * config.select_block_size)
        total = 0.0
        for i, p in enumerate(p_cmp):
            start = i * config.compress_stride
            shared = min(start + config.compress_block_size, selection.stop) - max(start, selection.start)
            total += p * max(shared, 0) / config.compress_stride
        p_slc.append(total)
    return p_slc


def importance_by_formula(p_cmp: list[float], num_blocks: int, config: NSAConfig) -> list[float]:
    """Eq. 9 as written, blocks counted from 0: sum over m, n of p_cmp[(l'/d)(j + 1) - 1 - m - n]."""
    ratio = config.select_block_size // config.compress_stride
    p_slc = []
    for j in range(num_blocks):
        total = 0.0
        for m in range(ratio):
            for n in range(config.compress_block_size // config.compress_stride):
                i = ratio * (j + 1) - 1 - m - n
                total += p_cmp[i] if 0 <= i < len(p_cmp) else 0.0
        p_slc.append(total)
    return p_slc


def block_scores(
    q: Float[Tensor, "t h d"],
    k_cmp: Float[Tensor, "c g d"],
    length: int,
    config: NSAConfig,
    scale: float | None = None,
) -> Float[Tensor, "t g n"]:
    """Eqs. 8 to 10: the importance of every selection block, summed over a group's heads. No gradient."""
    q, k_cmp = q.detach(), k_cmp.detach()
    scale = q.shape[2] ** -0.5 if scale is None else scale
    heads_per_group = q.shape[1] // k_cmp.shape[1]
    num_blocks = num_selection_blocks(length, config)
    scores = q.new_zeros(q.shape[0], k_cmp.shape[1], num_blocks)
    for row, position in enumerate(query_positions(q.shape[0], length)):
        seen = visible_compressed(position, length, config)
        if not seen:
            continue
        for head in range(q.shape[1]):
            group = head // heads_per_group
            p_cmp = torch.softmax(scale * (k_cmp[seen, group] @ q[row, head]), dim=0)  # eq. 8
            p_slc = importance_by_overlap(p_cmp.tolist(), num_blocks, config)  # eq. 9
            scores[row, group] += torch.tensor(p_slc, dtype=scores.dtype)  # eq. 10
    return scores


def forced_blocks(position: int, config: NSAConfig) -> set[int]:
    """The first blocks of the sequence and the query's own with those just before it."""
    own = position // config.select_block_size
    initial = {block for block in range(config.num_initial_blocks) if block <= own}
    local = {own - back for back in range(config.num_local_blocks) if own - back >= 0}
    return initial | local


def select(scores: list[float], position: int, config: NSAConfig) -> list[int]:
    """Eq. 11 for one query and KV head: its n blocks, ascending, the empty slots -1."""
    chosen: set[int] = set()
    if position >= 0:
        own = position // config.select_block_size
        chosen = forced_blocks(position, config)
        others = [block for block in range(own + 1) if block not in chosen]
        # Of equal scores, the lower block; NaN counts as 0.
        others.sort(key=lambda block: (0.0 if math.isnan(scores[block]) else -scores[block], block))
        chosen.update(others[: config.num_selected_blocks - len(chosen)])
    return sorted(chosen) + [-1] * (config.num_selected_blocks - len(chosen))


def select_blocks(
    scores: Float[Tensor, "t g n"], length: int, config: NSAConfig
) -> Int[Tensor, "t g {config.num_selected_blocks}"]:
    """Eq. 11 for all queries: block_indices, int32."""
    positions = query_positions(scores.shape[0], length)
    picks = [
        [select(scores[row, group].tolist(), position, config) for group in range(scores.shape[1])]
        for row, position in enumerate(positions)
    ]
    return torch.tensor(picks, dtype=torch.int32).view(*scores.shape[:2], config.num_selected_blocks)
