"""StreamingLLM: attention sinks and a window, and nothing in between."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nsa.eval.methods.attention import causal, chunks, moved, scores, softmax, weigh
from nsa.eval.methods.budget import Split
from nsa.eval.methods.method import Method, Sequence


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(Method):
    """Each query reads the first `sink` tokens and the last `window`; positions are those within this cache.

    The cache has sink + window places. A query beyond them stands at its last place, so the sinks keep a distance
    below sink + window however long the text is. Sparse in both phases: the lower bound of the comparison.

    Source: arXiv:2309.17453, section 3.2 (4 sinks; 1020 to 2044 recent tokens in its tables).
    """

    name: ClassVar[str] = "streaming_llm"
    paper: ClassVar[str] = "https://arxiv.org/abs/2309.17453"

    sink: int = 4
    window: int = 1020

    def __post_init__(self) -> None:
        self.check(sink=0, window=1)

    @classmethod
    def at_budget(cls, split: Split) -> "StreamingLLM":
        """Nothing is chosen, so that part of the budget makes the window longer."""
        return cls(sink=split.sink, window=split.total - split.sink)

    def prefill(self, q: Tensor, sequence: Sequence) -> Tensor:
        (h, t, _), n = q.shape, sequence.k.shape[1]
        keys = torch.arange(n, device=q.device)
        sink = min(self.sink, n)
        parts = []
        for first, last in chunks(q, n):
            own, queries = keys[n - t + first : n - t + last], q[:, first:last]
            recent = keys > own[:, None] - self.window
            allowed = causal(t, n, q.device, first, last) & (recent | (keys < self.sink))
            s = scores(queries, sequence.k, sequence.scaling)
            if sink and sequence.inv_freq is not None:
                back = own.clamp(max=self.sink + self.window - 1) - own
                far = scores(moved(queries, back, sequence.inv_freq), sequence.k[:, :sink], sequence.scaling)
                s[..., :sink] = torch.where(recent[:, :sink], s[..., :sink], far)
            allowed = allowed.expand(h, -1, -1)
            sequence.read(allowed)
            parts.append(weigh(softmax(s, allowed), sequence.v, q.dtype))
        return torch.cat(parts, dim=1)

    decode = prefill
