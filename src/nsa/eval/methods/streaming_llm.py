"""StreamingLLM: attention sinks and a window, and nothing in between."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nsa.eval.methods.attention import chunk_size, moved, scores, softmax, weigh
from nsa.eval.methods.budget import Split
from nsa.eval.methods.method import Method
from nsa.eval.methods.sequence import Sequence


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
        t, n = q.shape[1], sequence.k.shape[1]
        step = max(self.window, 64)  # so many queries share one stretch of keys, at most twice the window
        step = min(step, chunk_size(q, min(n, self.sink + self.window + step)))
        parts = [self._chunk(q[:, i : i + step], sequence, n - t + i) for i in range(0, t, step)]
        return torch.cat(parts, dim=1)

    decode = prefill

    def _chunk(self, q: Tensor, sequence: Sequence, first: int) -> Tensor:
        """Queries at positions from `first` on."""
        h, t, _ = q.shape
        own = torch.arange(first, first + t, device=q.device)
        start = max(0, first - self.window + 1)  # of the windows
        sinks = torch.arange(min(self.sink, start), device=q.device)
        keys = torch.cat([sinks, torch.arange(start, first + t, device=q.device)])
        k, v = sequence.k[:, keys], sequence.v[:, keys]
        recent = keys > own[:, None] - self.window
        allowed = ((keys <= own[:, None]) & (recent | (keys < self.sink))).expand(h, -1, -1)
        s = scores(q, k, sequence.scaling)
        sink = min(self.sink, len(keys))  # the sinks are the first columns, inside the window or not
        if sink and sequence.inv_freq is not None:
            back = own.clamp(max=self.sink + self.window - 1) - own
            far = scores(moved(q, back, sequence.inv_freq), k[:, :sink], sequence.scaling)
            s[..., :sink] = torch.where(recent[:, :sink], s[..., :sink], far)
        sequence.read(allowed)
        return weigh(softmax(s, allowed), v, q.dtype)
