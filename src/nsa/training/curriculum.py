"""The curriculum: how long the rows are at each step, and what they hold."""

import re
from dataclasses import dataclass
from typing import Literal

from nsa.training.puzzles.puzzle import LEAST_TOKENS

SHARES = ("repeated", "retrieval", "puzzles")
GRAMMAR = (
    "LENGTHxSTEPS[:repeated=SHARE][:retrieval=SHARE][:puzzles=SHARE][:keys=NUMBER][:style=assert]"
    "[:blocks=all], such as 512x1000:retrieval=0.5"
)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """`steps` optimizer steps with rows of `length` tokens.

    `repeated` and `retrieval` are the shares of rows that are examples of nsa.training.retrieval, `puzzles` of those
    of nsa.training.puzzles; the rest is text of the corpus. `keys` is the number of names in a retrieval row, 0 for
    as many as come to fit, `style` how they are written. With `all_blocks` every query of NSA and InfLLM-V2 selects
    all blocks (in training; evaluation and the model are as configured): attention is learned densely, and by the
    selector's loss the choice that it will need.
    """

    length: int
    steps: int
    repeated: float = 0.0
    retrieval: float = 0.0
    puzzles: float = 0.0
    keys: int = 0
    style: Literal["keyword", "assert"] = "keyword"
    all_blocks: bool = False

    def __str__(self) -> str:
        parts = [f"{self.length}x{self.steps}"]
        parts += [f"{name}={getattr(self, name):g}" for name in (*SHARES, "keys") if getattr(self, name)]
        parts += ["style=assert"] * (self.style == "assert") + ["blocks=all"] * self.all_blocks
        return ":".join(parts)


def parse_stage(text: str) -> Stage:
    """The stage that `text` spells; ValueError with the grammar if it spells none."""
    size, *options = text.split(":")
    match = re.fullmatch(r"(\d+)x(\d+)", size)
    if match is None:
        raise ValueError(f"curriculum stage {text!r}: expected {GRAMMAR}")
    length, steps = int(match[1]), int(match[2])
    values: dict[str, float] = {}
    style: Literal["keyword", "assert"] = "keyword"
    for option in options:
        if option == "blocks=all":
            continue
        if option in ("style=assert", "style=keyword"):
            style = "assert" if option == "style=assert" else "keyword"
            continue
        match = re.fullmatch(r"(repeated|retrieval|puzzles)=(\d*\.?\d+)|(keys)=(\d+)", option)
        if match is None:
            raise ValueError(f"curriculum stage {text!r}: expected {GRAMMAR}, got the option {option!r}")
        if match[1]:
            values[match[1]] = float(match[2])
        else:
            values["keys"] = int(match[4])
    if length < 8 or steps < 1 or sum(values.get(name, 0.0) for name in SHARES) > 1.0:
        raise ValueError(
            f"curriculum stage {text!r}: rows have at least 8 tokens, a stage at least 1 step, "
            "and shares add up to at most 1"
        )
    if values.get("puzzles") and length < LEAST_TOKENS:
        raise ValueError(f"curriculum stage {text!r}: rows of puzzles have at least {LEAST_TOKENS} tokens")
    keys = int(values.pop("keys", 0))
    return Stage(length=length, steps=steps, keys=keys, style=style, all_blocks="blocks=all" in options, **values)


def parse_curriculum(texts: tuple[str, ...]) -> tuple[Stage, ...]:
    if not texts:
        raise ValueError(f"the curriculum is empty: expected at least one stage {GRAMMAR}")
    return tuple(parse_stage(text) for text in texts)
