"""Needle in a haystack: one definition in much text, by length and depth."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from nsa.eval.prompts import Prompt, planted
from nsa.eval.scoring import exact_match
from nsa.eval.tasks.task import Advance, Row, ignore
from nsa.eval.text import held_out_text
from nsa.training.retrieval import CHANCE


@dataclass(frozen=True, kw_only=True)
class Needle:
    """Exact match on a grid of lengths and depths; one row a cell.

    The chance of guessing a value, four digits without 0, is 9**-4.

    Args:
        lengths: tokens of prompt and answer together, exactly.
        depths: where the definition lies, from 0 (the text's start, farthest from the question) to 1 (right before).
        samples: prompts a cell.
        seed: decides all prompts, together with the tokenizer and the text.
        text: a source of held-out text (nsa.eval.text).
        chat: ask in the tokenizer's chat template.
    """

    name: ClassVar[str] = "needle"

    lengths: tuple[int, ...] = (256, 512, 1024)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples: int = 20
    seed: int = 0
    text: str = "python"
    chat: bool = False

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"needle: lengths must be positive token counts, got {list(self.lengths)}")
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise ValueError(f"needle: depths must lie between 0 and 1, got {list(self.depths)}")
        if self.samples < 1:
            raise ValueError(f"needle: samples must be positive, got {self.samples}")

    def prompts(self, tokenizer: Any, length: int, depth: float) -> list[Prompt]:
        """The prompts of one cell."""
        filler = held_out_text(self.text)
        seeds = (f"needle/{self.seed}/{length}/{depth}/{sample}" for sample in range(self.samples))
        return [planted(seed, filler, tokenizer, length, depth=depth, chat=self.chat) for seed in seeds]

    def num_steps(self, tokenizer: Any) -> int:
        return len(self.lengths) * len(self.depths) * self.samples

    def run(self, model: nn.Module, tokenizer: Any, advance: Advance = ignore) -> list[Row]:
        grid = [(length, depth) for length in self.lengths for depth in self.depths]
        prompts = [prompt for cell in grid for prompt in self.prompts(tokenizer, *cell)]
        right = exact_match(model, prompts, advance)  # all at once, for larger batches
        return [
            Row.of_answers(
                self.name, {"length": length, "depth": depth}, right[i * self.samples : (i + 1) * self.samples], CHANCE
            )
            for i, (length, depth) in enumerate(grid)
        ]
