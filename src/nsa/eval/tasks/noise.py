"""A needle in repeated noise (RULER's single needle): is one line found among thousands that are all the same?"""

from dataclasses import dataclass
from typing import Any, ClassVar

from nsa.eval.tasks.puzzles import PuzzleTask
from nsa.training.puzzles.puzzle import Kind
from nsa.training.puzzles.values import Noise as Puzzle


@dataclass(frozen=True, kw_only=True)
class Noise(PuzzleTask):
    """One row a length; see PuzzleTask. Chance is that of guessing a value: 9**-4."""

    name: ClassVar[str] = "noise"

    def kinds(self) -> list[tuple[dict[str, Any], Kind]]:
        return [({}, Puzzle())]
