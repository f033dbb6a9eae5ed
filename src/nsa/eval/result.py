"""The result of one evaluation: everything a table, a report or another program needs, as one JSON file."""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nsa.eval.scoring import mean_and_error
from nsa.eval.tasks.task import Row
from nsa.files import write_whole

FORMAT = 1  # raised when a reader of older files would misread newer ones


@dataclass(kw_only=True)
class Result:
    """Models x tasks -> rows, and the circumstances.

    `models` has one description a model (see Candidate.describe), `rows[name]` its rows in the tasks' order,
    `tasks` the parameters of every task by name, `run` command, date, versions and hardware.
    """

    models: list[dict[str, Any]]
    tasks: dict[str, dict[str, Any]]
    rows: dict[str, list[Row]]
    run: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    beside: str | None = None  # the reference, where it was named; in no file

    @property
    def names(self) -> list[str]:
        return [model["name"] for model in self.models]

    @property
    def reference(self) -> str | None:
        """The model the others are set against: the dense twin if there is one, else the first of several."""
        if self.beside or len(self.models) < 2:
            return self.beside
        return next((m["name"] for m in self.models if m["attention"] == "dense"), self.models[0]["name"])

    def of_task(self, name: str, task: str) -> list[Row]:
        return [row for row in self.rows[name] if row.task == task]

    def to_json(self) -> str:
        data = {"format": FORMAT, **{key: getattr(self, key) for key in ("run", "notes", "models", "tasks")}}
        data["rows"] = {name: [asdict(row) for row in rows] for name, rows in self.rows.items()}
        return json.dumps(_without_nan(data), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Result":
        data = json.loads(text)
        if data.get("format") != FORMAT:
            raise ValueError(f"expected a result of format {FORMAT}, got {data.get('format')!r}")
        rows = {name: [Row.from_dict(_with_nan(row)) for row in rows] for name, rows in data["rows"].items()}
        return cls(models=data["models"], tasks=data["tasks"], rows=rows, run=data["run"], notes=data["notes"])

    def save(self, path: Path) -> None:
        write_whole(path, self.to_json() + "\n")


def paired_difference(row: Row, other: Row) -> tuple[float, float]:
    """Mean and standard error of row - other, sample by sample; both rows must hold the same samples."""
    if (row.task, row.where, row.n) != (other.task, other.where, other.n):
        one, two = (f"{r.task} {r.where} n={r.n}" for r in (row, other))
        raise ValueError(f"rows of different samples have no paired difference: {one}, {two}")
    return mean_and_error([a - b for a, b in zip(row.values, other.values, strict=True)])


def _without_nan(data: Any) -> Any:
    """NaN is not JSON: it becomes null."""
    if isinstance(data, dict):
        return {key: _without_nan(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_without_nan(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _with_nan(row: dict[str, Any]) -> dict[str, Any]:
    numbers = {key: math.nan if row[key] is None else row[key] for key in ("value", "low", "high")}
    return {**row, **numbers, "values": [math.nan if v is None else v for v in row["values"]]}
