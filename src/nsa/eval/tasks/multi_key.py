"""The value of one of many names (RULER's multi-key needle): is a name told from others like it?"""

from dataclasses import dataclass
from typing import Any, ClassVar

from nsa.eval.tasks.puzzles import PuzzleTask
from nsa.training.puzzles.puzzle import Kind
from nsa.training.puzzles.values import Keys


@dataclass(frozen=True, kw_only=True)
class MultiKey(PuzzleTask):
    """One row a length and number of keys; see PuzzleTask. Chance is that of picking a value of the text: 1 / keys.

    Args:
        keys: names with a value, scattered in text; 0 for as many as fit, which leaves no text besides.
    """

    name: ClassVar[str] = "multikey"

    keys: tuple[int, ...] = (4, 0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.keys or min(self.keys) < 0:
            raise ValueError(f"multikey: keys must be 1 or more, or 0 for as many as fit, got {list(self.keys)}")

    def kinds(self) -> list[tuple[dict[str, Any], Kind]]:
        return [({"keys": keys} if keys else {"lines": "nothing but keys"}, Keys(keys=keys)) for keys in self.keys]
