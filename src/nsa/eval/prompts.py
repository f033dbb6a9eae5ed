"""Prompts with a planted fact: an exact length in tokens, an exact place, the same for every model.

They are the retrieval examples of training (nsa.training.retrieval: constants defined far above, asserted
later), with one question at the end, names that never occur in training, and held-out text as filler. For a model
that was tuned to chat, text and question become the user's message, and the answer begins the assistant's.
"""

import random
from dataclasses import dataclass
from typing import Any

from nsa.training.retrieval import Retrieval, RetrievalExample, retrieval_example
from nsa.training.tokenizer import encoder

MARK = "THE TEXT"  # stands for the user's message in a chat template


@dataclass(frozen=True)
class Prompt:
    """A question to a model: `tokens` end where the answer has to begin.

    `needle` is the span [first, last) of the tokens of the value to be found; the last `question` tokens are the
    question, which a model that keeps phases apart reads one at a time, after the text.
    """

    tokens: list[int]
    answer: list[int]
    needle: tuple[int, int]
    question: int = 1

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
    chat: bool = False,
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
        chat: put text and question into the tokenizer's chat template.
    """
    encode = encoder(tokenizer)
    asked = Retrieval(num_keys=num_keys, num_questions=1, num_hops=num_hops, held_out=True)

    def example(filler: str, length: int, **where: Any) -> RetrievalExample:
        """The same names and values whatever the length."""
        return retrieval_example(random.Random(seed), filler, length, encode, asked, **where)

    opening: list[int] = []
    asking: list[int] | None = None
    if chat:
        (drawn,) = example("", 24 * num_keys * num_hops + 24, depth=0.0).answers  # small: only for the name
        opening, asking = chat_frame(tokenizer, f"\nWhat is the value of {drawn.name} above?", f"{drawn.name}=")
        in_code = len(encode(f"f({drawn.name}="))
        length -= len(opening) + len(asking) - in_code
        distance = distance if distance is None else distance - len(asking) + in_code
    planted = example(filler, length, distance=distance, depth=depth)
    (answer,) = planted.answers
    ids = list(planted.ids)
    plain = list(encode(f"f({answer.name}="))
    text = opening + ids[: answer.start - len(plain)]
    question = plain if asking is None else asking
    first = len(opening) + answer.start - answer.distance
    needle = (first, first + answer.end - answer.start)
    return Prompt(text + question, ids[answer.start : answer.end], needle, len(question))


def chat_frame(tokenizer: Any, question: str, answer_begins: str) -> tuple[list[int], list[int]]:
    """Tokens before the user's text, and from the question to where the answer must begin.

    Raises:
        ValueError: if the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("chat prompts need a tokenizer with a chat template; this one has none")
    message = [{"role": "user", "content": MARK}]
    before, mark, after = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True).partition(
        MARK
    )
    if not mark:
        raise ValueError("the tokenizer's chat template does not show the user's message")
    encode = encoder(tokenizer)
    return list(encode(before)), [token for part in (question, after, answer_begins) for token in encode(part)]
