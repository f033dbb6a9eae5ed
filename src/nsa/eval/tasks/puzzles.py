"""What the tasks made of puzzles (nsa.training.puzzles) have in common; each is a file of its own."""

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from nsa.eval.prompts import Prompt, chat_frame
from nsa.eval.scoring import shares_found
from nsa.eval.tasks.task import Advance, Row, ignore
from nsa.eval.text import held_out_text
from nsa.training.puzzles.puzzle import Kind, lay
from nsa.training.tokenizer import encoder


@dataclass(frozen=True)
class Asked:
    """`spans` are the answers' places in `prompt.answer`; what lies between them is given, not asked."""

    prompt: Prompt
    spans: Sequence[tuple[int, int]]
    chance: float


@dataclass(frozen=True, kw_only=True)
class PuzzleTask(ABC):
    """The share of answers that greedy decoding says in full, each given the ones before it; one row a cell.

    Args:
        lengths: tokens of prompt, answers and the closing of their line together, exactly.
        samples: prompts a cell.
        seed: decides all prompts, together with the tokenizer and the text.
        text: a source of held-out text (nsa.eval.text).
        chat: ask in the tokenizer's chat template.
    """

    name: ClassVar[str]

    lengths: tuple[int, ...] = (1024,)
    samples: int = 50
    seed: int = 0
    text: str = "python"
    chat: bool = False

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"{self.name}: lengths must be positive token counts, got {list(self.lengths)}")
        if self.samples < 1:
            raise ValueError(f"{self.name}: samples must be positive, got {self.samples}")

    @abstractmethod
    def kinds(self) -> list[tuple[dict[str, Any], Kind]]:
        """The kinds of puzzles that are asked, each with what tells it apart in a row's `where`."""

    def asked(self, tokenizer: Any, length: int, kind: Kind) -> list[Asked]:
        """The prompts of one cell."""
        return [self._asked(tokenizer, length, kind, sample) for sample in range(self.samples)]

    def num_steps(self, tokenizer: Any) -> int:
        return len(self.lengths) * len(self.kinds()) * self.samples

    def run(self, model: nn.Module, tokenizer: Any, advance: Advance = ignore) -> list[Row]:
        rows = []
        for length in self.lengths:
            for where, kind in self.kinds():
                asked = self.asked(tokenizer, length, kind)
                shares = shares_found(model, [(one.prompt, one.spans) for one in asked], advance)
                chance = sum(one.chance for one in asked) / len(asked)
                rows.append(Row.of_shares(self.name, "answers", {"length": length, **where}, shares, chance))
        return rows

    def _asked(self, tokenizer: Any, length: int, kind: Kind, sample: int) -> Asked:
        seed, encode = f"{self.name}/{self.seed}/{length}/{kind}/{sample}", encoder(tokenizer)
        frame, room = None, length
        try:
            rng = random.Random(seed)
            puzzle = kind.make(rng, room, encode, True)
            if self.chat:  # drawn once more for what the template leaves
                opening, question = chat_frame(tokenizer, puzzle.asks, puzzle.question)
                room -= len(opening) + len(question) - len(encode(puzzle.question))
                rng = random.Random(seed)
                puzzle = kind.make(rng, room, encode, True)
                frame = chat_frame(tokenizer, puzzle.asks, puzzle.question)
            laid = lay(rng, puzzle, held_out_text(self.text), length, encode, frame)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error
        return Asked(Prompt(laid.tokens, laid.answer, laid.needle, laid.question), laid.spans, puzzle.chance)
