"""A comparison of methods for the terminal: one line a method, what it finds and what it costs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group

from nsa.eval.costs import HEADS, Costs
from nsa.eval.result import Result, paired_difference
from nsa.eval.scoring import wilson
from nsa.eval.tasks import Continuation, Perplexity
from nsa.eval.tasks.task import Row
from nsa.report.table import Table

LOSSES = (Perplexity.name, Continuation.name)


@dataclass(frozen=True)
class Quality:
    """A method's mean over a task's rows at one length, with its 95% interval (NaN bounds where nothing is known).

    Of losses the interval is that of the difference from the reference, sample by sample, laid around `value`: the
    texts differ much more from one another than methods do on one text.
    """

    value: float
    low: float
    high: float
    difference: float | None = None
    is_loss: bool = False

    def text(self) -> str:
        """For a table: "63.3% (51-74)", or "1.779 (+0.016 ± 0.004)"."""
        half = (self.high - self.low) / 2
        if not self.is_loss:
            share = f"{self.value:.1%}"
            return share if math.isnan(half) else f"{share} ({100 * self.low:.0f}-{100 * self.high:.0f})"
        if self.difference is None:
            return f"{self.value:.3f}"
        within = "" if math.isnan(half) else f" ± {half:.3f}"
        return f"{self.value:.3f} ({self.difference:+.3f}{within})"


def quality_of(result: Result, task: str) -> dict[tuple[str, int], Quality]:
    """(method, length) -> quality; of perplexity only that of all positions."""

    def counts(row: Row) -> bool:
        whole = row.where.get("positions", "all") == "all" or task == Continuation.name
        return row.n > 0 and whole and "length" in row.where

    rows: dict[tuple[str, int], list[Row]] = {}
    for name in result.names:
        for row in filter(counts, result.of_task(name, task)):
            rows.setdefault((name, row.where["length"]), []).append(row)
    return {
        (name, length): _quality(own, rows.get((result.reference or name, length), own))
        for (name, length), own in rows.items()
    }


def _quality(rows: Sequence[Row], reference: Sequence[Row]) -> Quality:
    value = sum(row.value for row in rows) / len(rows)
    if rows[0].task in LOSSES:
        if rows is reference:
            return Quality(value, math.nan, math.nan, is_loss=True)
        difference, error = paired_difference(rows[0], reference[0])
        return Quality(value, value - 1.96 * error, value + 1.96 * error, difference, is_loss=True)
    if any(row.correct is None for row in rows):
        return Quality(value, rows[0].low, rows[0].high)
    return Quality(value, *wilson(sum(row.correct or 0 for row in rows), sum(row.n for row in rows)))


def tables_of(result: Result, costs: Costs) -> list[Table]:
    """Two a length, quality and costs; rows of lm-eval, which have no length, in one more."""
    tables = []
    for length in costs.lengths():
        title = f"{length:,} tokens: right answers and their 95% interval; nats per token"
        title += f" and the difference from {result.reference}" if result.reference else ""
        qualities = {task: quality_of(result, task) for task in result.tasks}
        columns = [task for task, found in qualities.items() if any(at == length for _, at in found)]
        rows = []
        for name in result.names:
            found = [qualities[task].get((name, length)) for task in columns]
            rows.append([name, *("no result" if quality is None else quality.text() for quality in found)])
        tables.append(Table(title, ["", *columns], rows))
        title = f"{length:,} tokens, {costs.budget(length)}" if costs.budget(length) else f"{length:,} tokens"
        title += "; per query: keys attended to, keys read to choose (prefill + decode), time; cache of one sequence"
        here = {cost.method: cost for cost in costs.rows if cost.length == length}
        tables.append(
            Table(title, ["", *HEADS], [[name, *here[name].cells()] for name in result.names if name in here])
        )
    harness = [(name, row) for name in result.names for row in result.rows[name] if "length" not in row.where]
    if harness:
        rows = [[name, row.where["task"], row.unit, f"{row.value:.4f}", str(row.n)] for name, row in harness]
        tables.append(Table("lm-eval", ["", "task", "metric", "value", "n"], rows))
    return tables


def comparison_tables(result: Result, costs: Costs) -> Group:
    """For the terminal."""
    return Group(*(table.rich() for table in tables_of(result, costs)))


def comparison_markdown(result: Result, costs: Costs) -> str:
    """For a document."""
    return "\n\n".join(table.markdown() for table in tables_of(result, costs)) + "\n"
