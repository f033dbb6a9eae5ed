"""What a method has before it: one sequence in one layer, its own state there, and the count of the keys it reads."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass
class Reads:
    """Keys read in one layer and phase, summed over queries and averaged over the query heads.

    `attended` are keys that took part in the softmax; `scored` are vectors of a key's size that were read only to
    choose (all keys for exact_top, two a page for quest, one a centroid or a representative).
    """

    queries: int = 0
    attended: float | Tensor = 0.0
    scored: float | Tensor = 0.0

    def per_query(self) -> tuple[float, float]:
        """(attended, scored) of one query on average; zeros if there was none."""
        return float(self.attended) / max(1, self.queries), float(self.scored) / max(1, self.queries)


class Sequence:
    """One sequence in one layer: its keys and values (those not evicted), and the method's own state.

    Args:
        layer: index of the layer.
        inv_freq: the rotary embedding's frequencies [d/2], for methods that move positions.
        reads: where to count, by phase.
    """

    def __init__(self, layer: int, inv_freq: Tensor | None, reads: dict[str, Reads]) -> None:
        self.layer, self.inv_freq, self.reads = layer, inv_freq, reads
        self.k: Tensor = torch.empty(0)
        self.v: Tensor = torch.empty(0)
        self.room: tuple[Tensor, Tensor] | None = None  # k and v are its beginning, until a method replaces them
        self.length = 0  # tokens seen, evicted ones included
        self.scaling = 1.0  # of q . k before the softmax
        self.phase = "prefill"
        self.state: Any = None

    def append(self, k: Tensor, v: Tensor) -> None:
        """Remember the keys and values [g, t, d] of t new tokens; room for more is made a sixteenth at a time."""
        self.length += k.shape[1]
        if self.length == k.shape[1]:
            self.k, self.v = k, v
            return
        old, new = self.k.shape[1], self.k.shape[1] + k.shape[1]
        fits = self.room is not None and new <= self.room[0].shape[1] and self.k.data_ptr() == self.room[0].data_ptr()
        if self.room is None or not fits:
            more = (0, 0, 0, k.shape[1] + max(64, old // 16))
            self.room = (F.pad(self.k, more), F.pad(self.v, more))
        for room, x in zip(self.room, (k, v), strict=True):
            room[:, old:new] = x
        self.k, self.v = (room[:, :new] for room in self.room)

    def read(self, attended: Tensor | float, scored: Tensor | float = 0.0) -> None:
        """Count keys, summed over the queries, averaged over the heads; `attended` may be the mask [h, t, n]."""
        if isinstance(attended, Tensor) and attended.dtype == torch.bool:
            attended = attended.count_nonzero().double() / attended.shape[0]
        count = self.reads[self.phase]
        count.attended = count.attended + attended  # tensors stay where they are: asking a GPU would wait for it
        count.scored = count.scored + (scored.double() if isinstance(scored, Tensor) else scored)

    def copy(self) -> "Sequence":
        """Another sequence that goes on from here by itself (beam search)."""
        other = Sequence(self.layer, self.inv_freq, self.reads)
        self.room = None  # both would write into it
        other.__dict__.update(self.__dict__)
        if self.state is not None:
            other.state = self.state.copy()
        return other

    def num_bytes(self) -> int:
        """Bytes of the keys, the values and the state's tensors."""
        tensors = [self.k, self.v, *(vars(self.state).values() if self.state is not None else ())]
        return sum(x.numel() * x.element_size() for x in tensors if isinstance(x, Tensor))


@dataclass
class State:
    """What a method remembers of one sequence; subclasses add tensors, which are replaced, never written into."""

    def copy(self) -> Any:
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other


@dataclass
class Counts:
    """The reads of all layers of one cache."""

    layers: list[dict[str, Reads]] = field(default_factory=list)

    def per_query(self, phase: str) -> tuple[float, float]:
        """(attended, scored) keys of one query on average over the layers."""
        each = [layer[phase].per_query() for layer in self.layers if layer[phase].queries]
        if not each:
            return 0.0, 0.0
        return sum(a for a, _ in each) / len(each), sum(s for _, s in each) / len(each)
