"""Variable tracking (RULER's multi-hop task): which names have a value, directly or through others?"""

from dataclasses import dataclass
from typing import Any, ClassVar

from nsa.eval.tasks.puzzles import PuzzleTask
from nsa.training.puzzles.chains import Chains
from nsa.training.puzzles.puzzle import Kind


@dataclass(frozen=True, kw_only=True)
class Tracking(PuzzleTask):
    """One row a length and number of hops; see PuzzleTask.

    Chance is that of picking one of the names in the text: 1 / (chains * (hops + 1)). The first name stands beside
    the value itself: what is found without any hop is 1 / (hops + 1) of the answers.

    Args:
        hops: aliases in a chain.
        chains: chains in the text, of which one is asked for.
    """

    name: ClassVar[str] = "tracking"

    hops: tuple[int, ...] = (2, 3, 4)
    chains: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.hops or min(self.hops) < 1 or self.chains < 1:
            got = f"hops={list(self.hops)}, chains={self.chains}"
            raise ValueError(f"tracking: hops and chains must be positive, got {got}")

    def kinds(self) -> list[tuple[dict[str, Any], Kind]]:
        return [({"hops": hops, "chains": self.chains}, Chains(hops=hops, chains=self.chains)) for hops in self.hops]
