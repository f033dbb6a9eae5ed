"""Retrieval examples in the manner of source code: constants defined far above and used later.

    QX=4821                               the definition
    ...real code, hundreds of lines...    the filler
    f(QX=4821)                            the use, a keyword argument: the model must recall 4821

or, in the style "assert", `QX = "4821"` and `assert QX == "4821"`: more letters that say nothing, which is easier
to learn copying from, and harder to tell names apart in (docs/log.md).

A name is a few capital letters, a value a few random digits, so that guessing is worthless: the chance of a whole
value is 1 / 9**4. A row holds many definitions and as many uses, which supervises every row densely.
With `num_hops` > 1 a use goes through aliases (`BC=QX`). Names are split for good by a checksum: a tenth of them
never occurs in training and is used by evaluation alone (`held_out=True`).

Everything is drawn from the `random.Random` that the caller passes, so an example is a function of its seed.
Each piece of text is tokenized by itself and the ids are joined: where an answer lies in the tokens is then
exact for any tokenizer, and the length is met to the token by cutting filler.
"""

import random
import string
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

NAME_LETTERS, NAME_LENGTH = string.ascii_uppercase, 2
VALUE_LETTERS, VALUE_LENGTH = "123456789", 4  # no zero: a literal may not start with one
CHANCE = len(VALUE_LETTERS) ** -VALUE_LENGTH  # of guessing a value of the right form
HELD_OUT_ONE_IN = 10
BEGINS_ONE_IN = 8  # of the rows whose filler lies anywhere, those that begin with a definition

Encode = Callable[[str], Sequence[int]]
Style = Literal["keyword", "assert"]
# Before and after the value, in its definition and in its use.
STYLES: dict[Style, tuple[tuple[str, str], tuple[str, str]]] = {
    "keyword": (("{name}=", "\n"), ("f({name}=", ")\n")),
    "assert": (('{name} = "', '"\n'), ('assert {name} == "', '"\n')),
}


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """What a row defines and asks for."""

    num_keys: int | None = None
    """Names defined; None: a random number, up to as many as fit (training's dense rows)."""
    num_questions: int | None = None
    """Names used afterwards, each once, in random order; None: all of them."""
    num_hops: int = 1
    """1 asks for a name defined by a literal; h > 1 goes through h - 1 aliases."""
    held_out: bool = False
    """Use evaluation's names instead of training's."""
    style: Style = "keyword"
    """How definitions and uses are written; see the top of this file."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One value to be recalled. `start:end` are positions in the example's tokens."""

    name: str
    value: str
    start: int
    end: int
    distance: int
    """From an answer's token back to the same token in the definition."""


@dataclass(frozen=True, kw_only=True)
class RetrievalExample:
    """A row's tokens, and where in them the values are that are asked for."""

    ids: tuple[int, ...]
    answers: tuple[Answer, ...]
    """Answers in the order in which they come."""


def is_held_out(name: str) -> bool:
    """Whether a name belongs to evaluation. A fixed property of the name, the same on every machine."""
    return zlib.crc32(name.encode()) % HELD_OUT_ONE_IN == 0


def random_name(rng: random.Random, length: int, held_out: bool) -> str:
    while True:
        name = "".join(rng.choices(NAME_LETTERS, k=length))
        if is_held_out(name) == held_out:
            return name


def random_value(rng: random.Random) -> str:
    return "".join(rng.choices(VALUE_LETTERS, k=VALUE_LENGTH))


def filler_lines(rng: random.Random, filler: str, length: int) -> str:
    """About `length` characters of consecutive whole lines from a random place in `filler`."""
    if length <= 0 or not filler:
        return ""
    place = rng.randrange(max(1, len(filler) - length))
    place = filler.find("\n", place) + 1
    end = filler.find("\n", place + length)
    return filler[place : end + 1] if end >= 0 else filler[place:]


def retrieval_example(
    rng: random.Random,
    filler: str,
    length: int,
    encode: Encode,
    asked: Retrieval,
    *,
    distance: int | None = None,
    depth: float | None = None,
) -> RetrievalExample:
    """One row of exactly `length` tokens: definitions, filler, uses.

    Args:
        rng: all randomness.
        filler: text to take whole lines from, usually the corpus.
        length: tokens in the row.
        encode: str -> ids without special tokens.
        asked: keys and questions.
        distance: tokens from the first question's answer back to the value in its definition, exactly; the
            uses end the row. With depth None too: filler at random places, in one row of eight not at its start.
        depth: instead of distance, 0 (definitions at the row's start) to 1 (right before the uses).

    Returns:
        The example; `answers[i].start:answers[i].end` are the tokens of a value in `ids`.

    Raises:
        ValueError: if the row is too short for what it must hold, with both sizes.
    """
    keys = _draw_keys(rng, length, asked, encode)
    definitions = [piece for key in keys for piece in key.definition]
    questions = rng.sample(keys, len(keys) if asked.num_questions is None else asked.num_questions)
    uses = [key.use for key in questions]
    needed = sum(len(piece.ids) for piece in [*definitions, *uses])
    spare = length - needed
    if spare < 0:
        raise ValueError(
            f"a retrieval row of {length} tokens cannot hold {len(keys)} keys with {len(uses)} questions: "
            f"they take {needed}"
        )
    above, inside = _split_filler(rng, spare, definitions, questions[0], distance, depth)
    gaps = _sprinkle(rng, inside, definitions, uses, exact=distance is not None or depth is not None)
    return _assemble(rng, filler, encode, definitions, uses, above, gaps)


def repeated_example(rng: random.Random, length: int) -> str:
    """`length` characters: one random word, repeated to the end.

    The simplest thing to recall, and the one from which a model learns to copy at all: in short rows of these
    the previous-token head and the matching head form within some hundred steps; without them, they did not
    form at all in the budget of the demo (docs/log.md). The recipe starts with them.
    """
    period = rng.randrange(3, max(4, length // 2))
    word = "".join(rng.choices(string.ascii_letters + string.digits, k=period)) + rng.choice("\n ,=")
    return (word * (length // len(word) + 1))[:length]


@dataclass(frozen=True)
class _Piece:
    """A line of code; the tokens at `value` spell the value."""

    ids: tuple[int, ...]
    name: str
    value: str
    span: tuple[int, int]


@dataclass(frozen=True)
class _Key:
    definition: tuple[_Piece, ...]
    use: _Piece


def _piece(encode: Encode, before: str, value: str, after: str, name: str) -> _Piece:
    head, body, tail = (tuple(encode(part)) for part in (before, value, after))
    return _Piece(head + body + tail, name, value, (len(head), len(head) + len(body)))


def _draw_keys(rng: random.Random, length: int, asked: Retrieval, encode: Encode) -> list[_Key]:
    num_keys, num_hops = asked.num_keys, asked.num_hops
    if num_hops < 1:
        raise ValueError(f"num_hops must be at least 1, got {num_hops}")
    # Drawing must end: far fewer names than there are of this length on either side of the split.
    most_names = len(NAME_LETTERS) ** NAME_LENGTH // (2 * HELD_OUT_ONE_IN)
    if (num_keys or 1) * num_hops >= most_names:
        raise ValueError(f"{num_keys or 1} keys need longer names than {NAME_LENGTH} letters")
    budget = length * (1.0 - 0.5 * rng.random()) if num_keys is None else None
    keys: list[_Key] = []
    taken: set[str] = set()
    used = 0
    while budget is not None or len(keys) < (num_keys or 0):
        names: list[str] = []
        while len(names) < num_hops:
            name = random_name(rng, NAME_LENGTH, asked.held_out)
            if name not in taken:
                names.append(name)
                taken.add(name)
        value = random_value(rng)
        (before, after), (before_use, after_use) = STYLES[asked.style]
        lines = [_piece(encode, before.format(name=names[0]), value, after, names[0])]
        lines += [_piece(encode, f"{new}=", old, "\n", new) for old, new in pairwise(names)]
        key = _Key(tuple(lines), _piece(encode, before_use.format(name=names[-1]), value, after_use, names[-1]))
        used += sum(len(piece.ids) for piece in [*key.definition, key.use])
        if budget is not None and keys and used > budget:
            break
        keys.append(key)
        if len(taken) + num_hops > most_names:
            break
    return keys


def _split_filler(
    rng: random.Random,
    spare: int,
    definitions: list[_Piece],
    asked: _Key,
    distance: int | None,
    depth: float | None,
) -> tuple[int, int]:
    """Filler tokens above the definitions, and from there on."""
    if distance is None and depth is None:
        above = rng.randrange(spare // 4 + 1)
        if above % BEGINS_ONE_IN == 0:  # what a row begins with is learned from rows that begin with it
            above = 0
        return above, spare - above
    if depth is not None:
        if distance is not None or not 0.0 <= depth <= 1.0:
            raise ValueError(f"give distance, or depth in [0, 1], not depth={depth} with distance={distance}")
        above = round(depth * spare)
        return above, spare - above
    own = sum(len(piece.ids) for piece in asked.definition)
    place = definitions.index(asked.definition[0])
    after = sum(len(piece.ids) for piece in definitions[place:]) - asked.definition[0].span[0]
    least = after + asked.use.span[0]
    assert distance is not None  # given where depth is not
    inside = distance - least
    if inside < 0 or inside > spare:
        raise ValueError(
            f"distance {distance} is out of reach: with {own} tokens of definition this row allows "
            f"{least} to {least + spare}"
        )
    return spare - inside, inside


def _sprinkle(rng: random.Random, inside: int, definitions: list[_Piece], uses: list[_Piece], exact: bool) -> list[int]:
    """Filler tokens before each line after the first; most between definitions and uses."""
    gaps = [0] * (len(definitions) + len(uses))
    middle = len(definitions)
    while inside > 0 and not exact:
        size = min(inside, rng.randrange(40, 200))
        gaps[middle if rng.random() < 0.67 else rng.randrange(1, len(gaps))] += size
        inside -= size
    gaps[middle] += inside
    return gaps


def _assemble(
    rng: random.Random,
    filler: str,
    encode: Encode,
    definitions: list[_Piece],
    uses: list[_Piece],
    above: int,
    gaps: list[int],
) -> RetrievalExample:
    ids: list[int] = []
    places: dict[str, int] = {}
    answers: list[Answer] = []

    def fill(tokens: int) -> None:
        while tokens > 0:
            lines = filler_lines(rng, filler, tokens) or "\n"
            piece = list(encode(lines))[-tokens:]  # whole lines at the end, cut at the start
            ids.extend(piece)
            tokens -= len(piece)

    fill(above)
    for index, (piece, gap) in enumerate(zip([*definitions, *uses], gaps, strict=True)):
        fill(gap)
        start = len(ids) + piece.span[0]
        if index < len(definitions):
            # an alias is as far away as the literal it leads to
            places[piece.name] = places.get(piece.value, start)
        else:
            answers.append(
                Answer(
                    name=piece.name,
                    value=piece.value,
                    start=start,
                    end=len(ids) + piece.span[1],
                    distance=start - places[piece.name],
                )
            )
        ids.extend(piece.ids)
    return RetrievalExample(ids=tuple(ids), answers=tuple(answers))
