"""A comparison of methods for the terminal: one line a method, what it finds and what it costs."""

import math

from rich import box
from rich.console import Group
from rich.table import Table

from nsa.eval.costs import HEADS, Costs
from nsa.eval.result import Result
from nsa.eval.tasks import Continuation, Perplexity
from nsa.eval.tasks.task import Row


def quality_of(result: Result, task: str) -> dict[tuple[str, int], float]:
    """(method, length) -> the mean of the task's rows; of perplexity only that of all positions."""

    def counts(row: Row) -> bool:
        whole = row.where.get("positions", "all") == "all" or task == Continuation.name
        return row.n > 0 and whole and "length" in row.where

    values: dict[tuple[str, int], list[float]] = {}
    for name in result.names:
        for row in filter(counts, result.of_task(name, task)):
            values.setdefault((name, row.where["length"]), []).append(row.value)
    return {place: sum(own) / len(own) for place, own in values.items()}


def comparison_tables(result: Result, costs: Costs) -> Group:
    """Two tables a length; rows of lm-eval, which have no length, in one more."""
    tables = []
    for length in costs.lengths():
        quality = _table(f"{length:,} tokens: mean over each task's rows (losses in nats per token)")
        columns = [task for task in result.tasks if any(at == length for _, at in quality_of(result, task))]
        for column in columns:
            quality.add_column(column, justify="right")
        cost = _table(
            "per query: keys attended to, keys read to choose (prefill + decode), time; cache of one sequence"
        )
        for head in HEADS:
            cost.add_column(head, justify="right")
        for name in result.names:
            quality.add_row(name, *(_value(result, task, name, length) for task in columns))
            for own in costs.rows:
                if (own.method, own.length) == (name, length):
                    cost.add_row(name, *own.cells())
        tables += [quality, cost]
    harness = [(name, row) for name in result.names for row in result.rows[name] if "length" not in row.where]
    if harness:
        table = _table("lm-eval")
        for head in ("task", "metric", "value", "n"):
            table.add_column(head, justify="right")
        for name, row in harness:
            table.add_row(name, row.where["task"], row.unit, f"{row.value:.4f}", str(row.n))
        tables.append(table)
    return Group(*tables)


def _value(result: Result, task: str, name: str, length: int) -> str:
    value = quality_of(result, task).get((name, length), math.nan)
    if math.isnan(value):
        return "no result"
    return f"{value:.3f}" if task in (Perplexity.name, Continuation.name) else f"{value:.1%}"


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", min_width=13, no_wrap=True)
    return table
