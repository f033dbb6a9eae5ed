"""Names that stand for each other: RULER's variable tracking."""

import random
from dataclasses import dataclass
from itertools import pairwise

from nsa.training.puzzles.puzzle import Encode, Puzzle, new_names, new_values


@dataclass(frozen=True)
class Chains:
    """`QX=4821`, and further on `BC=QX`, `DE=BC`: all names that have the value are asked for, `assert 4821 == `...

    hops: aliases in a chain, 1 or more.
    chains: how many there are, their lines among each other; one is asked for.
    """

    hops: int = 2
    chains: int = 2

    def make(self, rng: random.Random, tokens: int, encode: Encode, held_out: bool) -> Puzzle:
        size = self.hops + 1
        names, values = new_names(rng, size * self.chains, held_out), new_values(rng, self.chains)
        left = []
        for number, value in enumerate(values):
            own = names[number * size : (number + 1) * size]
            left.append([f"{new}={old}\n" for old, new in pairwise([value, *own])])
        lines = []
        while any(left):
            chain = rng.choice([chain for chain in left if chain])
            lines.append(chain.pop(0))
        return Puzzle(
            lines=tuple(lines),
            question=f"assert {values[0]} == ",
            answers=tuple(names[:size]),
            between=(" == ",) * self.hops,
            closing="\n",
            asks=f"\nWhich names have the value {values[0]} above, directly or through others, in order?",
            chance=1 / len(names),
            needle=lines.index(f"{names[0]}={values[0]}\n"),
        )
