"""Recall of all values of one name, which lie at several places of a text (RULER's multi-value needle)."""

import random
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from nsa.eval.prompts import Prompt, chat_frame
from nsa.eval.scoring import shares_found
from nsa.eval.tasks.task import Advance, Row, ignore
from nsa.eval.text import held_out_text
from nsa.training.puzzles.puzzle import fill, new_values
from nsa.training.retrieval import CHANCE, random_name
from nsa.training.tokenizer import encoder


@dataclass(frozen=True, kw_only=True)
class MultiValue:
    """The share of values that greedy decoding says in full, each given the values before it; one row.

        QX.append(4821)            at `num_values` random places of the text
        assert QX == [4821, ...    the question: all of them, in their order

    Args:
        length: tokens of prompt, answer and the closing of its line together, exactly.
        num_values: values of the one name.
        samples: prompts.
        seed: decides all prompts, together with the tokenizer and the text.
        text: a source of held-out text (nsa.eval.text).
        chat: ask in the tokenizer's chat template.
    """

    name: ClassVar[str] = "multivalue"

    length: int = 1024
    num_values: int = 4
    samples: int = 50
    seed: int = 0
    text: str = "python"
    chat: bool = False

    def __post_init__(self) -> None:
        for name in ("length", "num_values", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"multivalue: {name} must be positive, got {getattr(self, name)}")

    def prompts(self, tokenizer: Any) -> list[tuple[Prompt, list[tuple[int, int]]]]:
        """Each prompt, and the spans of its answer's tokens that are a value."""
        return [self._prompt(tokenizer, sample) for sample in range(self.samples)]

    def num_steps(self, tokenizer: Any) -> int:
        return self.samples

    def run(self, model: nn.Module, tokenizer: Any, advance: Advance = ignore) -> list[Row]:
        shares = shares_found(model, self.prompts(tokenizer), advance)
        where = {"length": self.length, "values": self.num_values}
        return [Row.of_shares(self.name, "values", where, shares, CHANCE)]

    def _prompt(self, tokenizer: Any, sample: int) -> tuple[Prompt, list[tuple[int, int]]]:
        rng = random.Random(f"multivalue/{self.seed}/{self.length}/{self.num_values}/{sample}")
        encode = encoder(tokenizer)
        name = random_name(rng, 2, held_out=True)
        values = new_values(rng, self.num_values)
        opening: list[int] = []
        question = list(encode(f"assert {name} == ["))
        if self.chat:
            asks = f"\nWhich numbers were appended to {name} above, in order?"
            opening, question = chat_frame(tokenizer, asks, f"{name} = [")
        answer: list[int] = []
        spans = []
        for place, value in enumerate(values):
            answer += encode(", ") if place else []
            spans.append((len(answer), len(answer) + len(encode(value))))
            answer += encode(value)
        facts = [(list(encode(f"{name}.append(")), list(encode(value)), list(encode(")\n"))) for value in values]
        closing = len(encode("]\n"))
        taken = len(opening) + len(question) + len(answer) + closing + sum(len(part) for fact in facts for part in fact)
        spare = self.length - taken
        if spare < 0:
            raise ValueError(
                f"a multivalue row of {self.length} tokens cannot hold {self.num_values} values: they take {taken}"
            )
        cuts = [0, *sorted(rng.randint(0, spare) for _ in facts), spare]
        tokens, filler, first = opening, held_out_text(self.text), 0
        for place, (before, value_ids, after) in enumerate(facts):
            tokens = tokens + fill(rng, encode, filler, cuts[place + 1] - cuts[place]) + before
            first = first or len(tokens)
            tokens = tokens + value_ids + after
        tokens = tokens + fill(rng, encode, filler, cuts[-1] - cuts[-2]) + question
        return Prompt(tokens, answer, (first, first + len(facts[0][1])), len(question)), spans
