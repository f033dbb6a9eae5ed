"""What a task is, and what it returns.

A task is a frozen dataclass of its parameters with a `name` and

    num_steps(tokenizer) -> int                      how often `run` will call `advance`, for a progress bar
    run(model, tokenizer, advance=...) -> list[Row]  judge one model

Nothing of a model enters a prompt, so that every model, and every method laid over a model, answers the same
questions. `values` holds one number a sample, in the same order for every model: differences between models are
paired differences, which are much less noisy than the models themselves.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Protocol

from torch import nn

from nsa.eval.scoring import mean_and_error, wilson

Advance = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One cell of a task's result: a score with its 95% interval.

    `where` names the cell ({"length": 1024, "depth": 0.5}), `unit` says what the value is ("exact match", from 0
    to 1, or "nats per token"), `chance` what a model that finds nothing would score.
    """

    task: str
    unit: str
    where: dict[str, Any]
    value: float
    low: float
    high: float
    n: int
    correct: int | None = None
    chance: float | None = None
    values: list[float] = field(default_factory=list)

    @classmethod
    def of_answers(cls, task: str, where: dict[str, Any], right: Sequence[bool], chance: float) -> "Row":
        """Counts of right answers, with their Wilson interval."""
        correct, n = sum(right), len(right)
        low, high = wilson(correct, n)
        value = correct / n if n else math.nan
        values = [float(r) for r in right]
        return cls(task=task, unit="exact match", where=where, value=value, low=low, high=high, n=n,
                   correct=correct, chance=chance, values=values)  # fmt: skip

    @classmethod
    def of_shares(cls, task: str, what: str, where: dict[str, Any], shares: Sequence[float], chance: float) -> "Row":
        """Mean of one share a prompt, of its `what`; the interval is Wilson's of as many answers."""
        low, high = wilson(sum(shares), len(shares))  # wide enough: a share varies no more than a coin of that mean
        return cls(task=task, unit=f"share of {what}", where=where, value=sum(shares) / len(shares), low=low, high=high,
                   n=len(shares), chance=chance, values=list(shares))  # fmt: skip

    @classmethod
    def of_losses(cls, task: str, where: dict[str, Any], losses: Sequence[float]) -> "Row":
        """Mean of one loss a sequence; the interval is 1.96 standard errors over the sequences to each side."""
        mean, error = mean_and_error(losses)
        low, high = mean - 1.96 * error, mean + 1.96 * error
        return cls(task=task, unit="nats per token", where=where, value=mean, low=low, high=high, n=len(losses),
                   values=list(losses))  # fmt: skip

    @property
    def is_share(self) -> bool:
        """Whether it is of answers, right or wrong or in part: between 0 and 1, and the higher the better."""
        return self.unit == "exact match" or self.unit.startswith("share of ")

    @property
    def error(self) -> float:
        """The standard error of the mean of `values`."""
        return mean_and_error(self.values)[1]

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Row":
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise ValueError(f"a row of a result has unknown fields {unknown}; known are {sorted(known)}")
        return cls(**data)


class Task(Protocol):
    """The interface of every task; see the module's docstring."""

    name: ClassVar[str]

    def num_steps(self, tokenizer: Any) -> int: ...

    def run(self, model: nn.Module, tokenizer: Any, advance: Advance = ...) -> list[Row]: ...


def ignore(steps: int) -> None:
    """The `advance` of a caller who shows no progress."""
