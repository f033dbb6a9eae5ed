"""Common words (RULER's first aggregation task): which words of a long list occur often, where others occur seldom?"""

from dataclasses import dataclass
from typing import Any, ClassVar

from nsa.eval.tasks.puzzles import PuzzleTask
from nsa.training.puzzles.puzzle import Kind
from nsa.training.puzzles.words import Common


@dataclass(frozen=True, kw_only=True)
class CommonWords(PuzzleTask):
    """One row a length; see PuzzleTask. The words are asked for in the order in which they first occur.

    Chance is that of picking one of the list's different words, about 1 / (length / (tokens of a word * seldom)).

    Args:
        common: words that occur often.
        often: how often they occur.
        seldom: how often every other word occurs; there are as many of them as fit.
    """

    name: ClassVar[str] = "commonwords"

    common: int = 4
    often: int = 10
    seldom: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.common < 1 or not 1 <= self.seldom < self.often:
            got = f"common={self.common}, often={self.often}, seldom={self.seldom}"
            raise ValueError(f"commonwords: expected common >= 1 and 1 <= seldom < often, got {got}")

    def kinds(self) -> list[tuple[dict[str, Any], Kind]]:
        return [({"common": self.common}, Common(self.common, self.often, self.seldom))]
