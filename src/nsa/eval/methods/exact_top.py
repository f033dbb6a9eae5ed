"""Exact-Top: the keys with the truly highest scores, at the price of computing all of them."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nsa.eval.methods.attention import attend, causal, chunks, scores, top
from nsa.eval.methods.budget import Split
from nsa.eval.methods.method import Method
from nsa.eval.methods.sequence import Sequence


@dataclass(frozen=True, kw_only=True)
class ExactTop(Method):
    """Each query head reads the first `sink`, the last `local` and, of the rest, the `chosen` of highest q . k.

    An upper bound for selectors that are not trained. Sparse in both phases. Every visible key is scored.

    Source: NSA's paper, arXiv:2502.11089, section 4.2; the defaults are its budget at 32k tokens.
    """

    name: ClassVar[str] = "exact_top"
    paper: ClassVar[str] = "https://arxiv.org/abs/2502.11089"

    sink: int = 128
    local: int = 512
    chosen: int = 1920

    def __post_init__(self) -> None:
        self.check(sink=0, local=1, chosen=0)

    @classmethod
    def at_budget(cls, split: Split) -> "ExactTop":
        return cls(sink=split.sink, local=split.local, chosen=split.chosen)

    def prefill(self, q: Tensor, sequence: Sequence) -> Tensor:
        t, n = q.shape[1], sequence.k.shape[1]
        parts = []
        for first, last in chunks(q, n):
            queries, visible = q[:, first:last], causal(t, n, q.device, first, last)
            keys = torch.arange(visible.shape[1], device=q.device)
            own = keys[n - t + first :, None]
            forced = visible & ((keys < self.sink) | (keys > own - self.local))
            s = scores(queries, sequence.k[:, : len(keys)], sequence.scaling)
            chosen = top(torch.where(visible & ~forced, s, -torch.inf), self.chosen)
            parts.append(attend(queries, sequence, chosen | forced, s))
            sequence.read(0.0, visible.sum())
        return torch.cat(parts, dim=1)

    decode = prefill
