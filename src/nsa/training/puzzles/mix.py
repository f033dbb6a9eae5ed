"""The rows of puzzles that training mixes in: kinds and sizes at random, with training's names."""

import random
from collections.abc import Callable

from nsa.training.puzzles.chains import Chains
from nsa.training.puzzles.puzzle import LEAST_TOKENS, Encode, Kind, Laid, TooShort, lay
from nsa.training.puzzles.values import Keys, Noise, Pairs, Values
from nsa.training.puzzles.words import Common, Frequent

ATTEMPTS = 100

# Each draws the sizes of one kind, for so many tokens.
DRAWS: tuple[Callable[[random.Random, int], Kind], ...] = (
    lambda rng, tokens: Noise(),
    lambda rng, tokens: Keys(keys=rng.randint(2, max(2, tokens // 64))),
    lambda rng, tokens: Keys(keys=0),
    lambda rng, tokens: Keys(keys=rng.randint(4, max(4, tokens // 64)), questions=rng.randint(2, 4)),
    lambda rng, tokens: Values(values=rng.randint(2, 4)),
    lambda rng, tokens: Chains(hops=rng.randint(1, 4), chains=rng.randint(1, 3)),
    lambda rng, tokens: Common(common=rng.randint(1, 4), often=rng.randint(6, 12)),
    lambda rng, tokens: Frequent(asked=rng.randint(1, 3)),
    lambda rng, tokens: Pairs(),
)


def puzzle_row(rng: random.Random, filler: str, length: int, encode: Encode) -> tuple[list[int], list[tuple[int, int]]]:
    """A row of exactly `length` tokens, and the spans in it of what is to be recalled.

    It holds one puzzle or several of equal length, one below the other, each a whole.

    Raises:
        ValueError: a row shorter than LEAST_TOKENS.
    """
    if length < LEAST_TOKENS:
        raise ValueError(f"a row of puzzles needs {LEAST_TOKENS} tokens, got {length}")
    count = rng.randint(1, max(1, length // (4 * LEAST_TOKENS)))
    ids: list[int] = []
    answers: list[tuple[int, int]] = []
    for left in range(count, 0, -1):
        size = (length - len(ids)) // left
        laid = _laid(rng, filler, size, encode)
        start = len(ids) + len(laid.tokens)
        answers += [(start + begin, start + end) for begin, end in laid.spans]
        ids += laid.tokens + laid.answer + laid.closing
    return ids, answers


def _laid(rng: random.Random, filler: str, tokens: int, encode: Encode) -> Laid:
    """Draw until one fits."""
    for _ in range(ATTEMPTS):
        try:
            return lay(rng, rng.choice(DRAWS)(rng, tokens).make(rng, tokens, encode, False), filler, tokens, encode)
        except TooShort as error:
            reason = error
    raise reason
