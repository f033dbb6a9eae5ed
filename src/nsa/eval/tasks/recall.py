"""Recall of one of several values, directly or through aliases, by how far away the value lies."""

import random
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from nsa.eval.prompts import Prompt, planted
from nsa.eval.regions import ANYWHERE, BEYOND, INSIDE, OUT_OF_REACH
from nsa.eval.scoring import exact_match
from nsa.eval.tasks.task import Advance, Row, ignore
from nsa.eval.text import held_out_text
from nsa.training.retrieval import CHANCE

ATTEMPTS = 1000


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Exact match by hops and region; one row each.

    `num_keys` names are defined one below another and one is asked for (multi-key); with h hops the question goes
    through h - 1 aliases (multi-hop). Regions are of the distance between the value and its recall, for a window
    of w keys in each of L layers:

        inside the window           distance <= w                  one window-only layer sees it
        beyond the window           w < distance <= L(w - 1) + 1   window-only layers could pass it on
        beyond the stacked windows  distance > L(w - 1) + 1        no window-only model can know it

    A region that does not fit into `length` has no row. Chance is that of guessing a value, 36**-4; a model
    that sees the values but not their names can at best pick one of them: 1 / num_keys.

    Args:
        length: tokens of prompt and answer together, exactly.
        window_size: w of the models; None for one region, of all distances.
        num_layers: L of the models.
        num_keys: values in the text.
        hops: numbers of hops to ask for.
        samples: prompts a row.
        seed: decides all prompts, together with the tokenizer and the text.
        text: a source of held-out text (nsa.eval.text).
        chat: ask in the tokenizer's chat template.
    """

    name: ClassVar[str] = "recall"

    length: int = 1024
    window_size: int | None = 512
    num_layers: int = 1
    num_keys: int = 4
    hops: tuple[int, ...] = (1, 2)
    samples: int = 100
    seed: int = 0
    text: str = "python"
    chat: bool = False

    def __post_init__(self) -> None:
        for name in ("length", "window_size", "num_layers", "num_keys", "samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"recall: {name} must be positive, got {getattr(self, name)}")
        if not self.hops or min(self.hops) < 1:
            raise ValueError(f"recall: hops must be positive, got {list(self.hops)}")

    def regions(self) -> dict[str, tuple[int, int]]:
        """Region -> least and greatest distance; which of them a row can hold depends on its keys too."""
        if self.window_size is None:
            return {ANYWHERE: (1, self.length)}
        reach = self.num_layers * (self.window_size - 1) + 1
        regions = {
            INSIDE: (1, self.window_size),
            BEYOND: (self.window_size + 1, reach),
            OUT_OF_REACH: (max(self.window_size, reach) + 1, self.length),
        }
        return {name: (low, min(high, self.length)) for name, (low, high) in regions.items()
                if low <= min(high, self.length * 3 // 4)}  # fmt: skip

    def prompts(self, tokenizer: Any, hops: int, region: str) -> list[Prompt]:
        """The prompts of one row, at random distances of the region."""
        return [self._prompt(tokenizer, hops, region, sample) for sample in range(self.samples)]

    def num_steps(self, tokenizer: Any) -> int:
        return len(self.hops) * len(self.regions()) * self.samples

    def run(self, model: nn.Module, tokenizer: Any, advance: Advance = ignore) -> list[Row]:
        kinds = [(hops, region) for hops in self.hops for region in self.regions()]
        prompts = [prompt for kind in kinds for prompt in self.prompts(tokenizer, *kind)]
        right = exact_match(model, prompts, advance)  # all at once, for larger batches
        rows = []
        for i, (hops, region) in enumerate(kinds):
            where = {"length": self.length, "keys": self.num_keys, "hops": hops, "region": region}
            rows.append(Row.of_answers(self.name, where, right[i * self.samples : (i + 1) * self.samples], CHANCE))
        return rows

    def _prompt(self, tokenizer: Any, hops: int, region: str, sample: int) -> Prompt:
        """Which distances a row allows depends on the keys drawn, so draw until one fits."""
        low, high = self.regions()[region]
        seed = f"recall/{self.seed}/{self.length}/{self.num_keys}/{hops}/{region}/{sample}"
        distances, reason = random.Random(seed), ""
        for attempt in range(ATTEMPTS):
            try:
                return planted(
                    f"{seed}/{attempt}",
                    held_out_text(self.text),
                    tokenizer,
                    self.length,
                    num_keys=self.num_keys,
                    num_hops=hops,
                    distance=distances.randint(low, high),
                    chat=self.chat,
                )
            except ValueError as error:
                reason = str(error)
        raise ValueError(
            f"recall: rows of {self.length} tokens with {self.num_keys} keys and {hops} hops have no distance from "
            f"{low} to {high} ({region}): {reason}"
        )
