"""What an attention method is: a frozen dataclass of its hyper-parameters with `prefill` and `decode`.

A method sees one sequence in one layer at a time, without batch and without padding (cache.py takes the rows of a
batch apart), with the new keys already appended to `sequence.k` and `sequence.v`:

    prefill(q, sequence) -> out     several queries, the last t of the sequence
    decode(q, sequence) -> out      one query, the last

Shapes: q and out [h, t, d], k and v [g, n, d], where h query heads share g KV heads, h = g * r, head i using KV head
i // r. Keys and queries carry their rotary positions. What a method remembers between calls lies in
`sequence.state`; what it reads it says to `sequence.read`.
"""

from collections.abc import Sequence as Numbers
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from nsa.eval.methods.attention import dense
from nsa.eval.methods.budget import Split
from nsa.eval.methods.sequence import Sequence

PHASES = ("prefill", "decode")


@dataclass(frozen=True, kw_only=True)
class Method:
    """The interface; a method overrides the phases in which it is sparse, and is dense in the others."""

    name: ClassVar[str]
    paper: ClassVar[str]
    sparse_in: ClassVar[tuple[str, ...]] = PHASES
    native: ClassVar[bool] = False  # the model's own attention, which no other may replace

    @classmethod
    def at_budget(cls, split: Split) -> "Method":
        """The method with sizes such that a query reads the keys of `split`."""
        return cls()

    def prepare(self, model: nn.Module, tokens: Numbers[int]) -> "Method":
        """The method after what it does offline, with a sample of text; most do nothing."""
        return self

    def prefill(self, q: Tensor, sequence: Sequence) -> Tensor:
        return dense(q, sequence)

    def decode(self, q: Tensor, sequence: Sequence) -> Tensor:
        return dense(q, sequence)

    def check(self, **at_least: int) -> None:
        """ValueError in one line if a field is smaller than said."""
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise ValueError(f"{self.name}: expected {name} >= {least}, got {getattr(self, name)}")
