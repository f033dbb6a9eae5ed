"""InfLLM: a window, and blocks of distant memory found through a few representative keys."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nsa.eval.methods.attention import moved, scores, softmax, weigh, wide
from nsa.eval.methods.budget import PAPER, Split
from nsa.eval.methods.method import Method
from nsa.eval.methods.sequence import Sequence, State


@dataclass
class Memory(State):
    """Attention that each key received inside the window [g, n], and the blocks' representatives [g, blocks, d]."""

    received: Tensor
    representatives: Tensor


@dataclass(frozen=True, kw_only=True)
class InfLLM(Method):
    """A query at i reads one softmax over: the last `local` tokens at their own distances; the first `init` tokens
    and the tokens of `num_blocks` blocks of memory at one fixed rotary distance, `local`.

    Memory is all that lies between the initial tokens and the window, in blocks of `block_size`; a block exists once
    it has left the window as a whole. Its representative is the mean of the `representatives` keys that received most
    attention (summed over queries and the heads of a KV head) while they were inside. Queries retrieve in chunks of
    `chunk` (1 in decode): the chunk's mean query, at position `local`, times the representatives at position 0,
    summed over heads, so that all heads read the same blocks. Sparse in both phases.

    Source: arXiv:2402.04617, section 3, and its code's configuration: 128 initial tokens, blocks of 128, 4
    representatives, chunks of 512. The window and the number of blocks are the budget of NSA's paper.
    """

    name: ClassVar[str] = "infllm"
    paper: ClassVar[str] = "https://arxiv.org/abs/2402.04617"

    init: int = 128
    local: int = 512
    block_size: int = 128
    num_blocks: int = 15
    representatives: int = 4
    chunk: int = 512

    def __post_init__(self) -> None:
        self.check(init=0, local=1, block_size=1, num_blocks=0, representatives=1, chunk=1)

    @classmethod
    def at_budget(cls, split: Split) -> "InfLLM":
        """Blocks and chunks shrink with the budget: a block of 128 would be all of a small one."""
        scale = min(1.0, split.total / PAPER.total)
        size = max(1, round(cls.block_size * scale))
        return cls(
            init=split.sink,
            local=split.local,
            block_size=size,
            num_blocks=split.chosen // size,
            representatives=min(cls.representatives, size),
            chunk=max(1, round(cls.chunk * scale)),
        )

    def prefill(self, q: Tensor, sequence: Sequence) -> Tensor:
        start = sequence.length - q.shape[1]
        self._remember_new(sequence, q.shape[1])
        ends = [*range(start + self.chunk, sequence.length, self.chunk), sequence.length]
        firsts = [start, *ends[:-1]]
        parts = [self._chunk(q[:, a - start : b - start], sequence, a, b) for a, b in zip(firsts, ends, strict=True)]
        return torch.cat(parts, dim=1)

    def decode(self, q: Tensor, sequence: Sequence) -> Tensor:
        self._remember_new(sequence, 1)
        return self._chunk(q, sequence, sequence.length - 1, sequence.length)

    def _chunk(self, q: Tensor, sequence: Sequence, first: int, last: int) -> Tensor:
        """Queries [first, last)."""
        k, h = sequence.k, q.shape[0]
        queries = torch.arange(first, last, device=q.device)
        window = torch.arange(max(0, first - self.local + 1), last, device=q.device)
        q_far = self._moved(q, self.local - queries, sequence)
        far = torch.cat([torch.arange(min(self.init, last), device=q.device), self._retrieve(q_far, sequence, first)])
        k_far = self._moved(k[:, far], -far, sequence)

        s = torch.cat([scores(q_far, k_far, sequence.scaling), scores(q, k[:, window], sequence.scaling)], -1)
        gone = far <= queries[:, None] - self.local
        inside = (window > queries[:, None] - self.local) & (window <= queries[:, None])
        allowed = torch.cat([gone, inside], -1).expand(h, -1, -1)
        sequence.read(allowed)
        p = softmax(s, allowed)

        state = sequence.state
        received = p[..., len(far) :].reshape(k.shape[0], -1, len(window)).sum(1)
        sequence.state = Memory(state.received.index_add(1, window, received), state.representatives)
        return weigh(p, sequence.v[:, torch.cat([far, window])], q.dtype)

    def _retrieve(self, q_far: Tensor, sequence: Sequence, first: int) -> Tensor:
        """Positions of the tokens in the blocks that are most relevant to these queries, ascending."""
        left = max(0, first - self.local + 1 - self.init) // self.block_size
        self._represent(sequence, left)
        if not left or not self.num_blocks:
            return torch.arange(0, device=q_far.device)
        sequence.read(0.0, float(left))  # once for the chunk
        representatives = sequence.state.representatives
        mean = wide(q_far).mean(1).unflatten(0, (len(representatives), -1)).sum(1)  # g d
        relevance = torch.einsum("gd,gbd->b", mean, representatives[:, :left])
        blocks = relevance.argsort(descending=True, stable=True)[: self.num_blocks].sort().values
        tokens = torch.arange(self.block_size, device=q_far.device)
        return (self.init + blocks[:, None] * self.block_size + tokens).flatten()

    def _represent(self, sequence: Sequence, blocks: int) -> None:
        """Choose the representatives of blocks that have left the window since the last time."""
        state = sequence.state
        known = state.representatives.shape[1]
        if blocks <= known:
            return
        start, end = (self.init + b * self.block_size for b in (known, blocks))
        received = state.received[:, start:end].unflatten(1, (-1, self.block_size))
        best = received.argsort(dim=-1, descending=True, stable=True)[..., : self.representatives]
        keys = self._moved(sequence.k[:, start:end], -torch.arange(start, end, device=best.device), sequence)
        keys = keys.unflatten(1, (-1, self.block_size))
        mean = keys.gather(2, best[..., None].expand(-1, -1, -1, keys.shape[-1])).mean(2)
        sequence.state = Memory(state.received, torch.cat([state.representatives, mean], 1))

    def _remember_new(self, sequence: Sequence, t: int) -> None:
        g, _, d = sequence.k.shape
        nothing = wide(sequence.k).new_zeros(g, t)
        if sequence.state is None:
            sequence.state = Memory(nothing, nothing.new_zeros(g, 0, d))
        else:
            sequence.state = Memory(torch.cat([sequence.state.received, nothing], 1), sequence.state.representatives)

    def _moved(self, x: Tensor, by: Tensor, sequence: Sequence) -> Tensor:
        return x if sequence.inv_freq is None else moved(x, by, sequence.inv_freq)
