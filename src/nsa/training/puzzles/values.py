"""Values of names: one in repeated noise, of one of many names, of several, all of one."""

import random
from dataclasses import dataclass

from nsa.training.puzzles.puzzle import (
    Encode,
    Puzzle,
    TooShort,
    mean_tokens,
    new_names,
    new_values,
    new_words,
)
from nsa.training.retrieval import CHANCE, random_value


@dataclass(frozen=True)
class Noise:
    """One `QX=4821` in a line of random words that is repeated to the end; `f(QX=` asks for it."""

    def make(self, rng: random.Random, tokens: int, encode: Encode, held_out: bool) -> Puzzle:
        line = f"# {' '.join(new_words(rng, 8, held_out))}\n"
        return _asked(rng, 1, 1, held_out, noise=line * 50)


@dataclass(frozen=True)
class Keys:
    """`QX=4821` for many names, of which `questions` are asked for, one after the other: `f(QX=4821, BC=`...

    keys: names in the text, at least as many; 0: as many as fit, and hardly any other text.
    """

    keys: int = 0
    questions: int = 1

    def make(self, rng: random.Random, tokens: int, encode: Encode, held_out: bool) -> Puzzle:
        keys = self.keys or _as_many(rng, tokens, encode, self.questions)
        return _asked(rng, keys, self.questions, held_out, together=not self.keys)


@dataclass(frozen=True)
class Values:
    """`QX.append(4821)` at `values` places; `assert QX == [` asks for all of them, in their order."""

    values: int = 4

    def make(self, rng: random.Random, tokens: int, encode: Encode, held_out: bool) -> Puzzle:
        (name,), values = new_names(rng, 1, held_out), new_values(rng, self.values)
        return Puzzle(
            lines=tuple(f"{name}.append({value})\n" for value in values),
            question=f"assert {name} == [",
            answers=tuple(values),
            between=(", ",) * (len(values) - 1),
            closing="]\n",
            asks=f"\nWhich numbers were appended to {name} above, in order?",
            chance=1 / len(values) if len(values) > 1 else CHANCE,
        )


@dataclass(frozen=True)
class Pairs:
    """MQAR: `QX 4821` for as many names as fit, and nothing else; then names again, in another order, with values.

    queries: names asked for; 0: all of them, which takes half of the row.
    """

    queries: int = 0

    def make(self, rng: random.Random, tokens: int, encode: Encode, held_out: bool) -> Puzzle:
        pairs = _as_many(rng, tokens, encode, self.queries)
        names, values = new_names(rng, pairs, held_out), [random_value(rng) for _ in range(pairs)]
        asked = rng.sample(range(pairs), self.queries or pairs)
        return Puzzle(
            lines=tuple(f"{name} {value}\n" for name, value in zip(names, values, strict=True)),
            question=f"{names[asked[0]]} ",
            answers=tuple(values[key] for key in asked),
            between=tuple(f"\n{names[key]} " for key in asked[1:]),
            closing="\n",
            asks="\nWhich numbers stand beside these names above?",
            chance=_chance(pairs),
            needle=asked[0],
            together=True,
        )


def _as_many(rng: random.Random, tokens: int, encode: Encode, asked: int) -> int:
    """How many names go into the row, of which `asked` (0: all) are asked for; a tenth of it is left for chance."""
    each = mean_tokens(encode, [f"{name}={random_value(rng)}\n" for name in new_names(rng, 50, held_out=False)])
    room = 0.9 * tokens / each
    names = int(room - asked if asked else room / 2)
    if names < max(1, asked):
        raise TooShort(f"a row of {tokens} tokens is too short to ask for {max(1, asked)} of its names")
    return names


def _chance(values: int) -> float:
    """Of picking one of them, which may be the right one or another one that is the same."""
    return 1 / values + (1 - 1 / values) * CHANCE if values > 1 else CHANCE


def _asked(
    rng: random.Random, keys: int, questions: int, held_out: bool, noise: str = "", together: bool = False
) -> Puzzle:
    names, values = new_names(rng, keys, held_out), [random_value(rng) for _ in range(keys)]
    asked = rng.sample(range(keys), questions)
    listed = ", ".join(names[key] for key in asked)
    return Puzzle(
        lines=tuple(f"{name}={value}\n" for name, value in zip(names, values, strict=True)),
        question=f"f({names[asked[0]]}=",
        answers=tuple(values[key] for key in asked),
        between=tuple(f", {names[key]}=" for key in asked[1:]),
        closing=")\n",
        asks=f"\nWhat is the value of {listed} above?",
        chance=_chance(keys),
        needle=asked[0],
        noise=noise,
        together=together,
    )
