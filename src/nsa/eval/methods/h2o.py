"""H2O: what has gathered little attention is thrown away for good."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nsa.eval.methods.attention import causal, chunks, scores, softmax, top, weigh
from nsa.eval.methods.budget import Split
from nsa.eval.methods.method import Method
from nsa.eval.methods.sequence import Sequence, State


@dataclass
class Kept(State):
    """Of each KV head's n remaining keys: the attention gathered [g, n], and their positions [g, n]."""

    gathered: Tensor
    positions: Tensor


@dataclass(frozen=True, kw_only=True)
class H2O(Method):
    """Before each decode step every KV head keeps the first `sink`, the last `recent` (the new token included), and
    of the rest the `heavy` that have gathered most attention. The others leave the cache and never return.

    A key gathers the softmax probabilities of all queries so far, summed over the query heads of its KV head (the
    cache is one per KV head). The prompt's attention is dense.

    Source: arXiv:2306.14048, algorithm 1 (heavy and recent each a tenth of the prompt; no forced sinks); the
    defaults here are the common budget of NSA's paper.
    """

    name: ClassVar[str] = "h2o"
    paper: ClassVar[str] = "https://arxiv.org/abs/2306.14048"
    sparse_in: ClassVar[tuple[str, ...]] = ("decode",)

    sink: int = 128
    recent: int = 512
    heavy: int = 1920

    def __post_init__(self) -> None:
        self.check(sink=0, recent=1, heavy=0)

    @classmethod
    def at_budget(cls, split: Split) -> "H2O":
        return cls(sink=split.sink, recent=split.local, heavy=split.chosen)

    def prefill(self, q: Tensor, sequence: Sequence) -> Tensor:
        (h, t, _), (g, n, _) = q.shape, sequence.k.shape
        state = self._with_new(sequence, t)
        gathered, parts = state.gathered.clone(), []
        for first, last in chunks(q, n):
            allowed = causal(t, n, q.device, first, last).expand(h, -1, -1)
            sequence.read(allowed)
            m = allowed.shape[-1]
            p = softmax(scores(q[:, first:last], sequence.k[:, :m], sequence.scaling), allowed)
            gathered[:, :m] += p.reshape(g, -1, m).sum(1)
            parts.append(weigh(p, sequence.v[:, :m], q.dtype))
        sequence.state = Kept(gathered, state.positions)
        return torch.cat(parts, dim=1)

    def decode(self, q: Tensor, sequence: Sequence) -> Tensor:
        sequence.state = self._with_new(sequence, 1)
        self._evict(sequence)
        state, (g, n, _) = sequence.state, sequence.k.shape
        allowed = torch.ones(q.shape[0], 1, n, dtype=torch.bool, device=q.device)
        sequence.read(allowed)
        p = softmax(scores(q, sequence.k, sequence.scaling), allowed)
        sequence.state = Kept(state.gathered + p.reshape(g, -1, n).sum(1), state.positions)
        return weigh(p, sequence.v, q.dtype)

    def _with_new(self, sequence: Sequence, t: int) -> Kept:
        """The state with places for the t new tokens, which have gathered nothing yet."""
        g = sequence.k.shape[0]
        fresh = torch.arange(sequence.length - t, sequence.length, device=sequence.k.device).expand(g, -1)
        state = sequence.state
        if state is None:
            dtype = torch.promote_types(sequence.k.dtype, torch.float32)
            return Kept(torch.zeros(fresh.shape, dtype=dtype, device=fresh.device), fresh)
        nothing = state.gathered.new_zeros(fresh.shape)
        return Kept(torch.cat([state.gathered, nothing], 1), torch.cat([state.positions, fresh], 1))

    def _evict(self, sequence: Sequence) -> None:
        """Keys lie in the order of their positions, so the sinks are the first columns and the recent ones the last."""
        n, state = sequence.k.shape[1], sequence.state
        budget = self.sink + self.recent + self.heavy
        if n <= budget:
            return
        columns = torch.arange(n, device=sequence.k.device)
        forced = (columns < self.sink) | (columns >= n - self.recent)
        keep = forced | top(state.gathered.nan_to_num(nan=0.0).masked_fill(forced, -torch.inf), self.heavy)
        kept = torch.where(keep, columns, n).sort().values[:, :budget]  # the same number in every head, ascending
        sequence.k, sequence.v = (
            x.gather(1, kept[..., None].expand(-1, -1, x.shape[-1])) for x in (sequence.k, sequence.v)
        )
        sequence.state = Kept(state.gathered.gather(1, kept), state.positions.gather(1, kept))
