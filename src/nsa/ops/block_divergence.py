"""How far the selector's choice is from the attention that it stands for, as a loss that can train it.

    m_j = sum over query heads h of a group, over keys i of block j:  softmax_i(d^-1/2 q_h . k_i)    what attention pays
    s_j = the block scores of eqs. 9 and 10, from the compressed keys                              what the choice reads
    loss = mean over queries and groups of  sum over free blocks j:  M_j log(M_j / S_j)

M and S are m and s over the blocks that a query is free to choose, each divided by its sum (or by LEAST, where the sum
is less: a query that pays nothing to what is free teaches little). The gradient reaches the compressed keys alone:
queries and raw keys are taken as they are.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from nsa.config import NSAConfig
from nsa.ops.selection import sum_into_blocks
from nsa.ops.tiles import accumulation_dtype

LEAST = 1e-6  # of a block's share: a score may be 0


class Queries(NamedTuple):
    """Some queries of a batch, whose rows follow one another: m runs of r neighbours each.

    token: which of all tokens it is.
    position: in its own sequence; negative for padding.
    first_key, first_block: where that sequence's keys and compressed blocks begin among those of all.
    """

    token: Int[Tensor, "m r"]
    position: Int[Tensor, "m r"]
    first_key: Int[Tensor, "m r"]
    first_block: Int[Tensor, "m r"]


def block_divergence(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b s g d"],
    k_cmp: Float[Tensor, "b c g d"],
    config: NSAConfig,
    queries: Queries,
    longest: int,
) -> Float[Tensor, ""]:
    """The loss above, of some queries; 0 where none of them has a free block.

    Args:
        q: all queries.
        k: the selected branch's keys.
        k_cmp: the compressed keys; those of packed sequences follow one another without gaps.
        queries: those that are looked at. Neighbours share the keys that are read for them, so that nothing here is
            larger than their number times the longest sequence.
        longest: a bound on the tokens of a sequence.

    Returns:
        fp32, or fp64 where q is.

    Source: the idea is that of DeepSeek-V3.2's indexer (arXiv:2512.02556), for eq. 10's scores. Tested against
    sums over tokens, query by query.
    """
    wide = accumulation_dtype(q.dtype)
    neighbours = queries.token.shape[1]
    with torch.autocast(q.device.type, enabled=False):
        some = q.detach().flatten(0, 1)[queries.token].to(wide) * q.shape[-1] ** -0.5
        blocks, compressed = config.num_selection_blocks(longest), config.num_compressed_blocks(longest)
        own, seen = queries.position.clamp(min=0), queries.position + 1
        with torch.no_grad():
            # The run's last key ends what is read for it; its first query's sequence begins inside.
            begin = (queries.first_key + queries.position).amax(1) + 2 - longest - neighbours
            read = _Read.of(k, begin, longest + neighbours - 1)
            mass = read.attended(some, queries.first_key, seen, blocks * config.select_block_size)
            mass = mass.unflatten(-1, (blocks, -1)).sum(-1)
        whole = torch.div(seen - config.compress_block_size, config.compress_stride, rounding_mode="floor") + 1
        read = _Read.of(k_cmp, queries.first_block[:, 0], compressed + neighbours // config.compress_stride + 1)
        scores = sum_into_blocks(read.attended(some, queries.first_block, whole, compressed), config)
        scores = F.pad(scores, (0, max(0, blocks - scores.shape[-1])))[..., :blocks]
        block = torch.arange(blocks, device=q.device)
        last = own // config.select_block_size - config.num_local_blocks
        free = (block >= config.num_initial_blocks) & (block <= last[..., None]) & (seen[..., None] > 0)
        target, predicted = (_shares(each, free[:, :, None]) for each in (mass, scores))
        each = (target * (target.clamp(min=LEAST).log() - predicted.clamp(min=LEAST).log())).sum(-1).mean(-1)
        return each.sum() / free.any(-1).sum().clamp(min=1)


class _Read(NamedTuple):
    """The keys that each run reads, and the first one's number among all."""

    keys: Float[Tensor, "m n g d"]
    begin: Int[Tensor, " m"]

    @classmethod
    def of(cls, k: Float[Tensor, "b s g d"], begin: Int[Tensor, " m"], count: int) -> "_Read":
        """`count` keys from `begin` on, or all where there are fewer; the nearest ones where some would lie outside."""
        k = k.flatten(0, 1)
        count = min(count, k.shape[0])
        begin = begin.clamp(0, k.shape[0] - count)
        return cls(k[begin[:, None] + torch.arange(count, device=k.device)], begin)

    def attended(
        self, q: Float[Tensor, "m r h d"], first: Int[Tensor, "m r"], seen: Int[Tensor, "m r"], count: int
    ) -> Float[Tensor, "m r g count"]:
        """Softmax over the `seen` keys from `first` on, summed over a group's heads; of the `count` keys from there."""
        n, groups = self.keys.shape[1:3]
        begin = self.begin[:, None]
        number = (begin + torch.arange(n, device=q.device))[:, None]
        allowed = (number >= first[..., None]) & (number < (first + seen)[..., None])
        scores = torch.einsum("mrgpd,mngd->mrgpn", q.unflatten(2, (groups, -1)), self.keys.to(q.dtype))
        scores = scores.masked_fill(~allowed[:, :, None, None], torch.finfo(q.dtype).min)
        p = scores.softmax(-1).sum(3)
        ours = torch.arange(count, device=q.device)
        at = ((first - begin)[..., None] + ours).clamp(0, max(n - 1, 0))
        return p.gather(-1, at[:, :, None].expand(-1, -1, groups, -1)) * (ours < seen[..., None])[:, :, None]


def _shares(each: Tensor, free: Tensor) -> Tensor:
    each = each * free
    return each / each.sum(-1, keepdim=True).clamp(min=LEAST)
