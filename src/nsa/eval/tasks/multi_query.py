"""The values of several names, asked for one after the other (RULER's multi-query needle)."""

from dataclasses import dataclass
from typing import Any, ClassVar

from nsa.eval.tasks.puzzles import PuzzleTask
from nsa.training.puzzles.puzzle import Kind
from nsa.training.puzzles.values import Keys


@dataclass(frozen=True, kw_only=True)
class MultiQuery(PuzzleTask):
    """One row a length; see PuzzleTask. Chance is that of picking a value of the text: 1 / keys.

    Args:
        keys: names with a value, scattered in text.
        queries: how many of them are asked for.
    """

    name: ClassVar[str] = "multiquery"

    keys: int = 8
    queries: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.queries <= self.keys:
            raise ValueError(f"multiquery: queries must be 1 to keys={self.keys}, got {self.queries}")

    def kinds(self) -> list[tuple[dict[str, Any], Kind]]:
        return [({"keys": self.keys, "queries": self.queries}, Keys(keys=self.keys, questions=self.queries))]
