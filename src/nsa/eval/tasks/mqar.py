"""Multi-query associative recall: a row of nothing but pairs, then many of their names again."""

from dataclasses import dataclass
from typing import Any, ClassVar

from nsa.eval.tasks.puzzles import PuzzleTask
from nsa.training.puzzles.puzzle import Kind
from nsa.training.puzzles.values import Pairs


@dataclass(frozen=True, kw_only=True)
class MQAR(PuzzleTask):
    """One row a length, with as many pairs as fit; see PuzzleTask. Chance is that of picking a value: 1 / pairs.

    Args:
        queries: how many of the names are asked for.
    """

    name: ClassVar[str] = "mqar"

    queries: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.queries < 1:
            raise ValueError(f"mqar: queries must be positive, got {self.queries}")

    def kinds(self) -> list[tuple[dict[str, Any], Kind]]:
        return [({"queries": self.queries}, Pairs(self.queries))]
