"""Words that occur more often than others: one a line, and nothing else in the row."""

import random
from dataclasses import dataclass

from nsa.training.puzzles.puzzle import Encode, Puzzle, TooShort, mean_tokens, new_words

MOST_WORDS = 20_000  # different ones; of 343,000 a tenth is held out


@dataclass(frozen=True)
class Common:
    """`common` words occur `often` times, as many others as fit `seldom` times; the common ones are asked for.

    They are to be named in the order in which they first occur.
    """

    common: int = 4
    often: int = 10
    seldom: int = 2

    def make(self, rng: random.Random, tokens: int, encode: Encode, held_out: bool) -> Puzzle:
        each = mean_tokens(encode, [f"{word}\n" for word in new_words(rng, 30, held_out)])
        rare = max(1, int(0.9 * tokens / each - self.common * (self.often + 1)) // self.seldom)
        words = new_words(rng, self.common + min(rare, MOST_WORDS), held_out)
        common = words[: self.common]
        lines = common * self.often + words[self.common :] * self.seldom
        rng.shuffle(lines)
        return _named(lines, sorted(common, key=lines.index), "common, by appearance", len(words))


@dataclass(frozen=True)
class Frequent:
    """The word of rank r occurs in proportion to r**-2; the `asked` most frequent are asked for, in that order."""

    asked: int = 3

    def make(self, rng: random.Random, tokens: int, encode: Encode, held_out: bool) -> Puzzle:
        each = mean_tokens(encode, [f"{word}\n" for word in new_words(rng, 30, held_out)])
        total = 0.9 * tokens / each - self.asked - 3
        counts = [count for rank in range(1, 100) if (count := int(0.6 * total / rank**2)) > 0]
        if len(counts) <= self.asked or counts[self.asked - 1] == counts[self.asked]:
            raise TooShort(f"a row of {tokens} tokens is too short to tell its {self.asked} most frequent words")
        words = new_words(rng, len(counts), held_out)
        lines = [word for word, count in zip(words, counts, strict=True) for _ in range(count)]
        rng.shuffle(lines)
        return _named(lines, words[: self.asked], "frequent, most first", len(words))


def _named(lines: list[str], answers: list[str], what: str, distinct: int) -> Puzzle:
    return Puzzle(
        lines=tuple(f"{line}\n" for line in lines),
        question=f"# {what}: ",
        answers=tuple(answers),
        between=(" ",) * (len(answers) - 1),
        closing="\n",
        asks=f"\nWhich {len(answers)} words of the list above are the most {what}?",
        chance=1 / distinct,
        needle=lines.index(answers[0]),
        together=True,
    )
