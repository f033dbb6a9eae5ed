"""Frequent words (RULER's second aggregation task): which words occur most, where frequency falls by a power law?"""

from dataclasses import dataclass
from typing import Any, ClassVar

from nsa.eval.tasks.puzzles import PuzzleTask
from nsa.training.puzzles.puzzle import Kind
from nsa.training.puzzles.words import Frequent


@dataclass(frozen=True, kw_only=True)
class FrequentWords(PuzzleTask):
    """One row a length; see PuzzleTask. The most frequent word is asked for first.

    Chance is that of picking one of the list's different words. A model that names words at the rate at which they
    occur is right more often, for the first of them in 6 of 10 cases.

    Args:
        words: how many are asked for.
    """

    name: ClassVar[str] = "frequentwords"

    words: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.words < 1:
            raise ValueError(f"frequentwords: words must be positive, got {self.words}")

    def kinds(self) -> list[tuple[dict[str, Any], Kind]]:
        return [({"words": self.words}, Frequent(self.words))]
