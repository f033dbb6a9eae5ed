"""A table without its form, and its forms: in the terminal, in Markdown."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table as RichTable
from rich.text import Text


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column names the row."""

    title: str
    header: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        lines = [self.header, ["---", *("--:" for _ in self.header[1:])], *self.rows]
        return f"### {self.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def rich(self) -> RichTable:
        return rich_table(self.title, self.header, self.rows)


def rich_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str | Text]]) -> RichTable:
    """For the terminal; nothing in the cells is taken for rich's markup."""
    table = RichTable(
        title=Text(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False
    )  # fmt: skip
    for place, name in enumerate(header):
        table.add_column(Text(name), justify="right" if place else "left", no_wrap=not place)
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return table


def format_number(value: float) -> str:
    """1536 -> 1,536; 8192 -> 8k; 0.123456 -> 0.123."""
    if not math.isfinite(value):
        return "–"
    if abs(value) >= 4096 and value % 1024 == 0:
        return f"{value / 1024:.0f}k"
    if abs(value) >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.3g}"
