"""Quest: pages of keys ranked by an upper bound of their scores."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nsa.eval.methods.attention import attend, dense, top, wide
from nsa.eval.methods.budget import Split
from nsa.eval.methods.method import Method
from nsa.eval.methods.sequence import Sequence, State


@dataclass
class Pages(State):
    """Elementwise least and greatest key of the full pages, [g, pages, d] each."""

    low: Tensor
    high: Tensor


@dataclass(frozen=True, kw_only=True)
class Quest(Method):
    """A decode step reads, for each query head, the `num_pages` pages whose bound is highest:

        bound(page) = sum_c max(q_c low_c, q_c high_c) >= q . k for every key k of the page

    with low and high the elementwise minimum and maximum of the page's rotated keys. No token is forced. Prefill and
    the first `dense_layers` layers are dense. Two vectors a page are read to choose.

    Source: arXiv:2406.10774, section 3 and its code: pages of 16, layers 0 and 1 dense, at least 3 pages.
    """

    name: ClassVar[str] = "quest"
    paper: ClassVar[str] = "https://arxiv.org/abs/2406.10774"
    sparse_in: ClassVar[tuple[str, ...]] = ("decode",)

    page_size: int = 16
    num_pages: int = 160
    dense_layers: int = 2

    def __post_init__(self) -> None:
        self.check(page_size=1, num_pages=1, dense_layers=0)

    @classmethod
    def at_budget(cls, split: Split) -> "Quest":
        return cls(num_pages=max(3, -(-split.total // cls.page_size)))

    def decode(self, q: Tensor, sequence: Sequence) -> Tensor:
        if sequence.layer < self.dense_layers:
            return dense(q, sequence)
        bounds = self.bounds(q, *self._pages(sequence))
        sequence.read(0.0, 2.0 * bounds.shape[-1])
        pages = top(bounds, self.num_pages)
        return attend(q, sequence, pages.repeat_interleave(self.page_size, -1)[..., : sequence.k.shape[1]])

    def bounds(self, q: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """[h, 1, d], [g, pages, d] -> [h, 1, pages]."""
        q = wide(q).unflatten(0, (len(low), -1))  # g r 1 d
        at_least, at_most = wide(low)[:, None], wide(high)[:, None]  # g 1 pages d
        return torch.maximum(q * at_least, q * at_most).sum(-1).flatten(0, 1)[:, None]

    def _pages(self, sequence: Sequence) -> tuple[Tensor, Tensor]:
        """Of all pages; the full ones are remembered, the last one may be short."""
        k, size = sequence.k, self.page_size
        full = k.shape[1] // size
        known = sequence.state.low.shape[1] if sequence.state is not None else 0
        if full > known:
            new = k[:, known * size : full * size].unflatten(1, (-1, size))
            low, high = new.amin(2), new.amax(2)
            if known:
                low, high = torch.cat([sequence.state.low, low], 1), torch.cat([sequence.state.high, high], 1)
            sequence.state = Pages(low, high)
        rest = k[:, full * size :]
        low, high = (sequence.state.low, sequence.state.high) if full else (k[:, :0], k[:, :0])
        if not rest.shape[1]:
            return low, high
        return torch.cat([low, rest.amin(1, True)], 1), torch.cat([high, rest.amax(1, True)], 1)
