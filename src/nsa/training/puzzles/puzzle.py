"""What a puzzle is, and how it is laid into exactly so many tokens."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from nsa.training.retrieval import NAME_LETTERS, Encode, filler_lines, is_held_out, random_name, random_value

LEAST_TOKENS = 128
"""Of a row of puzzles: some kind fits whatever the tokenizer."""


@dataclass(frozen=True, kw_only=True)
class Puzzle:
    """Lines to lie in a text, and what is asked below it.

    `answers` follow `question`, with `between[i]` between answers i and i + 1 (that is given, not asked), and
    `closing` ends the line. `asks` is the question in words. `needle` is the number of the line that has the first
    answer. `chance` is that of a model which picks one of the values, names or words that the text holds; where it
    holds a single value, that of guessing one. `noise` is text to lie between the lines instead of the filler that
    the caller has. `together`: nothing lies between the lines, for they fill the row.
    """

    lines: tuple[str, ...]
    question: str
    answers: tuple[str, ...]
    between: tuple[str, ...]
    closing: str
    asks: str
    chance: float
    needle: int = 0
    noise: str = ""
    together: bool = False


class TooShort(ValueError):
    """A row that cannot hold its puzzle."""


class Kind(Protocol):
    """A kind of puzzle with its sizes."""

    def make(self, rng: random.Random, tokens: int, encode: Encode, held_out: bool) -> Puzzle:
        """A puzzle that fits into `tokens` tokens, or one that needs more."""


@dataclass(frozen=True)
class Laid:
    """`tokens` end where the first answer begins; `spans` are the answers' places in `answer`; `needle` is the
    span in `tokens` of the line that has the first answer, and the last `question` tokens are the question."""

    tokens: list[int]
    answer: list[int]
    spans: tuple[tuple[int, int], ...]
    closing: list[int]
    needle: tuple[int, int]
    question: int


def lay(
    rng: random.Random,
    puzzle: Puzzle,
    filler: str,
    length: int,
    encode: Encode,
    frame: tuple[Sequence[int], Sequence[int]] | None = None,
) -> Laid:
    """The puzzle in `length` tokens, answers and closing included: its lines at random places of the filler, in order.

    `frame` is what comes before the text, and the question instead of the puzzle's own (for chat).

    Raises:
        TooShort: if the lines and the question alone are longer, with both sizes.
    """
    opening, question = frame or ((), encode(puzzle.question))
    encoded = {line: list(encode(line)) for line in dict.fromkeys(puzzle.lines)}
    lines = [encoded[line] for line in puzzle.lines]
    answer: list[int] = []
    spans = []
    for place, text in enumerate(puzzle.answers):
        answer += encode(puzzle.between[place - 1]) if place else []
        spans.append((len(answer), len(answer) + len(encode(text))))
        answer += encode(text)
    closing = list(encode(puzzle.closing))
    taken = len(opening) + len(question) + len(answer) + len(closing) + sum(map(len, lines))
    spare = length - taken
    if spare < 0:
        raise TooShort(
            f"a row of {length} tokens cannot hold {len(lines)} lines with question and answers: they take {taken}"
        )
    cuts = [0, *sorted(spare if puzzle.together else rng.randint(0, spare) for _ in lines), spare]
    tokens, starts = list(opening), []
    for place, line in enumerate(lines):
        tokens += fill(rng, encode, puzzle.noise or filler, cuts[place + 1] - cuts[place])
        starts.append(len(tokens))
        tokens += line
    tokens += fill(rng, encode, puzzle.noise or filler, cuts[-1] - cuts[-2])
    needle = (starts[puzzle.needle], starts[puzzle.needle] + len(lines[puzzle.needle]))
    return Laid([*tokens, *question], answer, tuple(spans), closing, needle, len(question))


def fill(rng: random.Random, encode: Encode, filler: str, count: int) -> list[int]:
    """`count` tokens of whole lines, cut at the start."""
    ids: list[int] = []
    while len(ids) < count:
        ids += encode(filler_lines(rng, filler, 4 * count) or "\n")
    return ids[len(ids) - count :]


def new_names(rng: random.Random, count: int, held_out: bool) -> list[str]:
    """Different names, of two letters, or as many more as there must be for so many."""
    length = 2
    while len(NAME_LETTERS) ** length < 20 * count + 200:  # a tenth of them is held out
        length += 1
    names: dict[str, None] = {}
    while len(names) < count:
        names[random_name(rng, length, held_out)] = None
    return list(names)


def new_values(rng: random.Random, count: int) -> list[str]:
    """Different values, of far fewer than there are."""
    values: dict[str, None] = {}
    while len(values) < count:
        values[random_value(rng)] = None
    return list(values)


def new_words(rng: random.Random, count: int, held_out: bool) -> list[str]:
    """Different words of three syllables."""
    words: dict[str, None] = {}
    while len(words) < count:
        word = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3))
        if is_held_out(word) == held_out:
            words[word] = None
    return list(words)


def mean_tokens(encode: Encode, lines: Sequence[str]) -> float:
    return sum(len(encode(line)) for line in lines) / len(lines)
