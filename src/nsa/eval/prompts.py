"""Prompts with a planted fact: an exact length in tokens, an exact place, the same for every model.

They are the retrieval examples of training (nsa.training.retrieval: constants defined far above, asserted
later), with one question at the end, names that never occur in training, and held-out text as filler.
"""

import random
from dataclasses import dataclass
from typing import Any

from nsa.training.retrieval import VALUE_LETTERS, RetrievalExample, retrieval_example
from nsa.training.tokenizer import encoder

VALUE_LENGTH = 4
CHANCE = len(VALUE_LETTERS) ** -VALUE_LENGTH  # of guessing a value of the right form


@dataclass(frozen=True)
class Prompt:
    """A question to a model: `tokens` end where the answer has to begin.

    `needle` is the span [first, last) of the tokens of the value to be found.
    """

    tokens: list[int]
    answer: list[int]
    needle: tuple[int, int]

    @property
    def distance(self) -> int:
        """From an answer's token back to the same token in the definition.

        The query that must find it is one token before the answer: a window of w keys reaches w tokens of distance,
        and L layers of them L * (w - 1) + 1.
        """
        return len(self.tokens) - self.needle[0]


def planted(
    seed: str,
    filler: str,
    tokenizer: Any,
    length: int,
    *,
    num_keys: int = 1,
    num_hops: int = 1,
    distance: int | None = None,
    depth: float | None = None,
) -> Prompt:
    """One prompt, which together with its answer and the closing of its line is `length` tokens long.

    Args:
        seed: decides names, values and filler; a text such as "needle/0/1024/0.5/7".
        filler: held-out text.
        tokenizer: of transformers; every piece is tokenized by itself, without special tokens.
        length: tokens in all.
        num_keys: values defined, of which one is asked for.
        num_hops: 1 asks for a name defined by its value, h goes through h - 1 aliases.
        distance, depth: where the definitions lie; give one of the two (see retrieval_example).
    """
    example: RetrievalExample = retrieval_example(
        random.Random(seed),
        filler,
        length,
        num_keys=num_keys,
        num_questions=1,
        num_hops=num_hops,
        distance=distance,
        depth=depth,
        value_length=VALUE_LENGTH,
        held_out=True,
        tokenizer=encoder(tokenizer),
    )
    (answer,) = example.answers
    ids = list(example.ids)
    first = answer.start - answer.distance
    return Prompt(ids[: answer.start], ids[answer.start : answer.end], (first, first + answer.end - answer.start))
