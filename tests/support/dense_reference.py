"""Attention under a mask with the full score matrix, in any dtype and on any device: truth in fp64, plain otherwise.

The brute force of nsa.testing is a Python loop over queries; thousands of them on a GPU need this. It shares no code
with the ops or the kernels, and `tests/kernels` holds it to the brute force.
"""

import torch
from layouts import Layout
from torch import Tensor

from nsa.config import NSAConfig


class Visible:
    """Which keys the queries of a layout see: bool [b, 1 or g, t, keys]."""

    def __init__(self, layout: Layout, config: NSAConfig, device: torch.device | str) -> None:
        self.config = config
        b, t, s = layout.b, layout.t, layout.s
        c = layout.num_compressed_blocks(config)
        # Position of each query, and of each key in its sequence; -1 where there is none.
        self.position = torch.full((b, t), -1, dtype=torch.long)
        self.query_of = torch.full((b, t), -1, dtype=torch.long)
        self.key_position, self.key_of = (torch.full((b, s), -2, dtype=torch.long) for _ in range(2))
        self.cmp_end, self.cmp_of = (torch.full((b, c), -2, dtype=torch.long) for _ in range(2))
        for number, member in enumerate(layout.members(config)):
            queries, length = member.query_range.stop - member.query_range.start, member.length
            self.position[member.row, member.query_range] = torch.arange(length - queries, length)
            self.query_of[member.row, member.query_range] = number
            self.key_position[member.row, member.key_range] = torch.arange(length)
            self.key_of[member.row, member.key_range] = number
            blocks = torch.arange(member.block_range.stop - member.block_range.start)
            self.cmp_end[member.row, member.block_range] = (
                blocks * config.compress_stride + config.compress_block_size - 1
            )
            self.cmp_of[member.row, member.block_range] = number
        for name in ("position", "query_of", "key_position", "key_of", "cmp_end", "cmp_of"):
            setattr(self, name, getattr(self, name).to(device))

    def compressed(self) -> Tensor:
        own = self.query_of[:, :, None] == self.cmp_of[:, None]
        return (own & (self.cmp_end[:, None] <= self.position[:, :, None]))[:, None]

    def causal(self) -> Tensor:
        own = self.query_of[:, :, None] == self.key_of[:, None]
        return (own & (self.key_position[:, None] <= self.position[:, :, None]))[:, None]

    def window(self) -> Tensor:
        recent = self.key_position[:, None] > self.position[:, :, None] - self.config.window_size
        return self.causal() & recent[:, None]

    def selected(self, block_indices: Tensor) -> Tensor:
        size = self.config.select_block_size
        blocks = -(-self.key_of.shape[1] // size) + 1
        chosen = torch.zeros(*block_indices.shape[:3], blocks + 1, dtype=torch.bool, device=block_indices.device)
        chosen.scatter_(-1, block_indices.long().where(block_indices >= 0, blocks), True)
        chosen[..., blocks] = False
        b, t, g, _ = block_indices.shape
        of_key = (self.key_position.clamp_min(0) // size)[:, None, None].expand(b, g, t, -1)
        return chosen.transpose(1, 2).gather(-1, of_key) & self.causal()

    def block_scores(self, q: Tensor, k_cmp: Tensor, scale: float) -> Tensor:
        """Eqs. 8-10: probabilities by overlap of token ranges in units of the stride, [b, t, g, blocks]."""
        config = self.config
        g = k_cmp.shape[2]
        scores = _scores(q, k_cmp, self.compressed(), scale)
        p = torch.softmax(scores, -1).nan_to_num(0.0).unflatten(1, (g, -1)).sum(2)  # [b, g, t, c]
        blocks = config.num_selection_blocks(self.key_of.shape[1])
        start = torch.arange(blocks, device=q.device) * config.select_block_size
        first = self.cmp_end - config.compress_block_size + 1
        low = torch.maximum(first[:, :, None], start)
        high = torch.minimum(self.cmp_end[:, :, None] + 1, start + config.select_block_size)
        overlap = ((high - low).clamp_min(0) // config.compress_stride).to(p.dtype)  # [b, c, blocks]
        return (p @ overlap[:, None]).transpose(1, 2)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """out [b, t, h, e] and lse [b, t, h] with every step in the inputs' dtype; 0 and -inf for empty rows."""
    h, g = q.shape[2], k.shape[2]
    scores = _scores(q, k, visible, scale)
    empty = ~visible.any(-1).repeat_interleave(h // visible.shape[1], 1)
    p = torch.softmax(scores.masked_fill(empty[..., None], 0.0), -1).masked_fill(empty[..., None], 0.0)
    lse = scores.float().logsumexp(-1) if scores.dtype != torch.float64 else scores.logsumexp(-1)
    return (p @ v.transpose(1, 2).repeat_interleave(h // g, 1)).transpose(1, 2), lse.transpose(1, 2)


def _scores(q: Tensor, k: Tensor, visible: Tensor, scale: float) -> Tensor:
    h, g = q.shape[2], k.shape[2]
    scores = q.transpose(1, 2) @ k.transpose(1, 2).repeat_interleave(h // g, 1).transpose(-1, -2) * scale
    return scores.masked_fill(~visible.repeat_interleave(h // visible.shape[1], 1), -torch.inf)
