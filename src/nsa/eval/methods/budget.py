"""The common budget: how many keys a query may read, and how they are divided.

The paper (arXiv:2502.11089, section 4.2) gives every method 2560 keys at up to 32k tokens: the first 128, the last
512 and 1920 chosen by the method. For other lengths the shares stay the same.
"""

from dataclasses import dataclass

PAPER_CONTEXT = 32_768


@dataclass(frozen=True)
class Split:
    """Keys a query may read: the first `sink`, the last `local` (its own included), and `chosen` by the method."""

    sink: int
    local: int
    chosen: int

    @property
    def total(self) -> int:
        return self.sink + self.local + self.chosen


PAPER = Split(128, 512, 1920)


def split(context: int, budget: float | None = None) -> Split:
    """The paper's division of a budget, for a context of so many tokens.

    Args:
        context: tokens that the last query could read.
        budget: keys per query; up to 1 a share of the context; None the paper's share, 2560 of 32,768.

    Returns:
        sink : local : chosen = 1 : 4 : 15, each at least 1. A budget that covers the context is all local: then
        there is nothing to choose, and every method is dense attention.

    Raises:
        ValueError: a budget of fewer than 3 keys, or not positive.
    """
    share = PAPER.total / PAPER_CONTEXT if budget is None else budget
    total = round(share * context) if share <= 1 else round(share)
    if total < 3:
        raise ValueError(f"expected a budget of at least 3 keys (one sink, one local, one chosen), got {total}")
    if total >= context:
        return Split(0, context, 0)
    sink = max(1, round(total * PAPER.sink / PAPER.total))
    local = max(1, round(total * PAPER.local / PAPER.total))
    return Split(sink, local, total - sink - local)
