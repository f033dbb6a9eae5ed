"""A result as a table: one line a cell of a task, one column a model, for the terminal and for the report."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group
from rich.text import Text

from nsa.eval.result import Result, paired_difference
from nsa.eval.tasks.task import Row
from nsa.report.table import rich_table


@dataclass(frozen=True)
class Line:
    """`cells` has one (value, detail) pair a model, in the order of `Result.names`."""

    where: str
    cells: list[tuple[str, str]]


@dataclass(frozen=True)
class Block:
    """The lines of one task; `title` also says what they have in common, and what finding nothing scores."""

    title: str
    lines: list[Line]


def blocks_of(result: Result) -> list[Block]:
    """Needle grids are summed over the depths (the heat map shows them); all else is one line a row."""
    blocks = []
    for task in result.tasks:
        columns = {name: summed(result.of_task(name, task)) for name in result.names}
        reference = columns.get(result.reference or "", [])
        places, shared = own_and_shared([row.where for row in next(iter(columns.values()), [])])
        lines = []
        for index, place in enumerate(places):
            cells = []
            for name, rows in columns.items():
                other = None if name == result.reference or not reference else reference[index]
                cells.append(cell(rows[index], other))
            lines.append(Line(place, cells))
        shared = ", ".join(filter(None, [shared, chances_of(next(iter(columns.values()), []))]))
        blocks.append(Block(f"{task}: {shared}" if shared else task, lines))
    return blocks


def own_and_shared(places: Sequence[Mapping[str, Any]]) -> tuple[list[str], str]:
    """What tells each row from the others, in words, and what all of them have in common."""
    parts = [{key: _words(key, value) for key, value in place.items()} for place in places]
    if len(parts) < 2:
        return [", ".join(part.values()) for part in parts], ""
    common = [key for key in parts[0] if len({part.get(key) for part in parts}) == 1]
    own = [", ".join(words for key, words in part.items() if key not in common) for part in parts]
    return own, ", ".join(parts[0][key] for key in common)


def result_tables(result: Result) -> Group:
    """For the terminal: one table a task, its name above it."""
    tables = []
    for block in blocks_of(result):
        rows: list[list[str | Text]] = [
            [line.where, *(Text.assemble(value, (f"\n{detail}", "dim")) for value, detail in line.cells)]
            for line in block.lines
        ]
        tables.append(rich_table(block.title, ["", *result.names], rows))
    return Group(*tables)


def _words(key: str, value: Any) -> str:
    """("length", 1024) -> "1,024 tokens"."""
    if key == "length":
        return f"{value:,} tokens"
    if key == "depth":
        return f"depth {value:.0%}"
    if key == "positions":
        return "all positions" if value == "all" else f"positions {value[0]:,} to {value[1] - 1:,}"
    if key in ("hops", "keys"):
        return f"{value} {key[:-1] if value == 1 else key}"
    return value if isinstance(value, str) else f"{key} {value}"


def chances_of(rows: Sequence[Row]) -> str:
    """What finding nothing scores, in words: one share, or the range of the rows'; "" where nothing is known."""
    chances = sorted({row.chance for row in rows if row.chance is not None})
    if not chances:
        return ""
    shares = [f"{chance:.1%}" if chance >= 0.001 else "< 0.1%" for chance in chances]
    return "chance " + " to ".join(dict.fromkeys([shares[0], shares[-1]]))


def cell(row: Row, reference: Row | None) -> tuple[str, str]:
    """(value, detail): of losses the paired difference from the reference, if there is one."""
    if not row.n:
        return "–", "no result"
    if row.is_share:
        return f"{row.value:.1%}", f"{sum(row.values):g}/{row.n} ({100 * row.low:.0f}-{row.high:.0%})"
    value = f"{row.value:.3f}"
    if reference is None or not reference.n or not row.values:
        return value, "" if math.isnan(row.error) else f"± {row.error:.3f}"
    difference, error = paired_difference(row, reference)
    return value, f"{difference:+.3f}" + ("" if math.isnan(error) else f" ± {error:.3f}")


def summed(rows: Sequence[Row]) -> list[Row]:
    """Rows that differ in their depth only become one."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        where = {key: value for key, value in row.where.items() if key != "depth"}
        groups.setdefault(str(where), []).append(row)
    summed = []
    for group in groups.values():
        first = group[0]
        if len(group) == 1:
            summed.append(first)
            continue
        right = [value == 1.0 for row in group for value in row.values]
        where = {key: value for key, value in first.where.items() if key != "depth"}
        summed.append(Row.of_answers(first.task, {**where, "over": "all depths"}, right, first.chance or 0.0))
    return summed
