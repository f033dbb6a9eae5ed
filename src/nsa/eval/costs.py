"""What each method reads, keeps and takes, summed over a comparison's cells: and as a table for the terminal."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from nsa.eval.methods.method import PHASES, Method
from nsa.report.table import format_number

HEADS = ("keys in prefill", "keys in decode", "read to choose", "cache, MiB", "ms in prefill", "ms in decode")


@dataclass(kw_only=True)
class Cost:
    """One method, or one trained model, at one length; per query, on average over queries, layers and query heads."""

    method: str
    length: int
    sizes: dict[str, Any]
    sparse_in: tuple[str, ...]
    paper: str
    queries: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))
    attended: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    scored: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    cache_bytes: int = 0
    peak_bytes: int = 0
    patterns: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, method: Method, length: int, record: dict[str, Any]) -> "Cost":
        """From the record of one cell of the row `name`; sums, not yet means."""
        sizes = {key: value for key, value in record["sizes"].items() if key != "patterns"}
        cost = cls(method=name, length=length, sizes=sizes, sparse_in=method.sparse_in, paper=method.paper)
        cost.peak_bytes = record.get("peak_bytes", 0)
        for layer in record.get("prepared", {}).get("patterns", ()):
            for pattern in layer:
                cost.patterns[pattern] = cost.patterns.get(pattern, 0) + 1
        reads = record.get("reads")
        if reads is None:
            return cost
        cost.cache_bytes = reads["cache_bytes"] if reads["decode"]["queries"] else 0  # of a text that was generated on
        for phase in PHASES:
            queries = reads[phase]["queries"]
            cost.queries[phase] = queries
            cost.attended[phase] = (reads[phase]["attended"] or 0.0) * queries
            cost.scored[phase] = (reads[phase]["scored"] or 0.0) * queries
            cost.seconds[phase] = reads[phase]["seconds"]
        return cost

    def add(self, other: "Cost") -> None:
        for phase in PHASES:
            for name in ("queries", "attended", "scored", "seconds"):
                getattr(self, name)[phase] += getattr(other, name)[phase]
        self.cache_bytes = max(self.cache_bytes, other.cache_bytes)
        self.peak_bytes = max(self.peak_bytes, other.peak_bytes)

    def per_query(self, name: str, phase: str) -> float | None:
        """The mean of "attended", "scored" or "seconds"; None where there was no query."""
        queries = self.queries[phase]
        return getattr(self, name)[phase] / queries if queries else None

    def keys(self, phase: str) -> float | None:
        """Keys attended to and vectors read to choose them."""
        parts = [self.per_query(name, phase) for name in ("attended", "scored")]
        return sum(part for part in parts if part is not None) if None not in parts else None

    def cells(self) -> list[str]:
        """For tables, in the order of HEADS."""
        prefill, decode = (self.per_query("attended", phase) for phase in PHASES)
        choose = [self.per_query("scored", phase) for phase in PHASES]
        times = [self.per_query("seconds", phase) for phase in PHASES]
        return [
            _number(prefill),
            _number(decode),
            " + ".join(_number(x) for x in choose),
            f"{self.cache_bytes / 2**20:.1f}" if self.cache_bytes else "–",
            *(f"{1000 * x:.2f}" if x is not None else "–" for x in times),
        ]


@dataclass(frozen=True)
class Costs:
    """One row a method and length; `budgets` has the keys of a query by length, `budget_of` whose number it is."""

    rows: list[Cost]
    budgets: dict[int, int] = field(default_factory=dict)
    budget_of: str = ""

    @classmethod
    def of(cls, each: Sequence[Cost], budgets: dict[int, int], budget_of: str = "") -> "Costs":
        """Sum the cells of every method and length."""
        rows: dict[tuple[int, str], Cost] = {}
        for cost in each:
            place = (cost.length, cost.method)
            if place in rows:
                rows[place].add(cost)
            else:
                rows[place] = cost
        return cls(list(rows.values()), budgets, budget_of)

    def plain(self) -> dict[str, Any]:
        """For JSON, beside the fields of a result."""
        return {"costs": [asdict(cost) for cost in self.rows], "budgets": self.budgets, "budget_of": self.budget_of}

    @classmethod
    def from_plain(cls, data: dict[str, Any]) -> "Costs":
        """What `plain` wrote, out of a file."""
        budgets = {int(length): keys for length, keys in data.get("budgets", {}).items()}
        return cls([Cost(**cost) for cost in data["costs"]], budgets, data.get("budget_of", ""))

    def lengths(self) -> list[int]:
        return sorted({cost.length for cost in self.rows})

    def budget(self, length: int) -> str:
        """In words, for a title; "" where nothing is known of it."""
        keys = self.budgets.get(length)
        if keys is None:
            return ""
        number = f"{keys:,} keys a query" if keys < length else "every key"
        return f"budget: {number}" + (f", as {self.budget_of} reads" if self.budget_of else "")


def _number(value: float | None) -> str:
    return "–" if value is None else format_number(round(value, 1))
