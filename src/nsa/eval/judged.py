"""What `nsa eval` judged of the runs of a report: files put together, models gathered by recipe, numbers over seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from nsa.eval.recipes import Recipe
from nsa.eval.result import Result
from nsa.eval.scoring import wilson
from nsa.eval.seeds import over_seeds
from nsa.eval.tasks.task import Row

ORACLE = ", oracle"
FREE = ("length", "lengths", "depths")  # parameters of a task by which only its rows are other ones
Rows = dict[int | None, list[Row]]  # by seed, None where no run says which


@dataclass(kw_only=True)
class Column:
    """A recipe, or a model that no run trained: the rows of one task after the other, seed by seed."""

    model: dict[str, Any]
    folders: dict[int | None, Path] = field(default_factory=dict)
    rows: Rows = field(default_factory=dict)

    def of_task(self, task: str) -> Rows:
        return {seed: [row for row in rows if row.task == task] for seed, rows in self.rows.items()}


@dataclass(kw_only=True)
class Judged:
    """Columns by name, in the order of the recipes; the tasks' parameters; the files."""

    columns: dict[str, Column]
    tasks: dict[str, dict[str, Any]]
    files: list[tuple[Path, Result]]

    def pooled(self, reference: str | None) -> Result:
        """A result whose models are the columns: seeds become one row each place, for charts and maps."""
        rows: dict[str, list[Row]] = {name: [] for name in self.columns}
        for task in self.tasks:
            own = {name: column.of_task(task) for name, column in self.columns.items()}
            for where, like in places(rows for each in own.values() for rows in each.values()).items():
                for name, seeds in own.items():
                    found = [row for each in seeds.values() for row in each if str(row.where) == where and row.n]
                    rows[name].append(pooled_row(found) if found else nothing_at(like))
        models = [{**column.model, "name": name} for name, column in self.columns.items()]
        return Result(models=models, tasks=self.tasks, rows=rows, beside=reference if reference in rows else None)


def read_judged(paths: Sequence[Path], recipes: Sequence[Recipe]) -> Judged:
    """Of several eval.json.

    Raises:
        ValueError: in one line, a file that is none; a model judged twice in the same place; a task that was asked
            with other parameters in another file, whose models cannot stand side by side.
    """
    judged = Judged(columns={}, tasks={}, files=[(path, read_result(path)) for path in paths])
    asked_in: dict[str, Path] = {}
    for path, result in judged.files:
        for task, parameters in result.tasks.items():
            before = judged.tasks.setdefault(task, dict(parameters))
            _check_same(task, before, parameters, asked_in.setdefault(task, path), path)
            before.update({key: _union(before[key], parameters[key]) for key in FREE if key in before})
        for model in result.models:
            name, seed = _place(model, recipes)
            folder = Path(model["folder"])
            if name in judged.columns and judged.columns[name].folders.get(seed, folder) != folder:
                if seed is not None:
                    both = f"{judged.columns[name].folders[seed]} and {folder}"
                    raise ValueError(f"{both} were both judged as seed {seed} of {name}; give one of them")
                name = str(folder) + (ORACLE if name.endswith(ORACLE) else "")
            column = judged.columns.setdefault(name, Column(model=model))
            column.folders[seed] = folder
            own = column.rows.setdefault(seed, [])
            known = {(row.task, str(row.where)) for row in own}
            for row in result.rows[model["name"]]:
                if (row.task, str(row.where)) in known:
                    raise ValueError(f"{path} judges {folder} by {row.task} once more; give one such file")
                own.append(row)
    order = {recipe.name: place for place, recipe in enumerate(recipes)}
    last = len(order)
    columns = sorted(judged.columns.items(), key=lambda item: order.get(item[0].removesuffix(ORACLE), last))
    judged.columns = dict(columns)
    return judged


def read_result(path: Path) -> Result:
    """An eval.json or compare.json; ValueError in one line for another file."""
    try:
        return Result.from_json(path.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is no result of `nsa eval` or `nsa compare`: {reason}") from error


def pooled_row(rows: Sequence[Row]) -> Row:
    """The rows of several seeds in one place as one: of shares all answers, of losses the mean of every sample's."""
    if len(rows) == 1:
        return rows[0]
    value, low, high = interval_of(rows)
    if rows[0].is_share:
        correct = None if any(row.correct is None for row in rows) else sum(row.correct or 0 for row in rows)
        values = [value for row in rows for value in row.values]
        return replace(rows[0], value=value, low=low, high=high, correct=correct, n=len(values), values=values)
    samples = [sum(each) / len(rows) for each in zip(*(row.values for row in rows), strict=False)]
    return replace(rows[0], value=value, low=low, high=high, n=len(samples), values=samples)


def interval_of(rows: Sequence[Row]) -> tuple[float, float, float]:
    """The mean over seeds and its 95% interval (nsa.eval.seeds).

    That of shares is never narrower than the Wilson interval of all answers together: seeds that all find nothing
    agree, and say no more for it.
    """
    mean, low, high = over_seeds([row.value for row in rows])
    if not rows[0].is_share:
        return mean, low, high
    least, most = wilson(sum(sum(row.values) for row in rows), sum(len(row.values) for row in rows))
    return mean, max(0.0, min(low, least)), min(1.0, max(high, most))


def places(tasks: Any) -> dict[str, Row]:
    """All places of some lists of rows, each with a row, in the order in which they come."""
    found: dict[str, Row] = {}
    for row in (row for each in zip_longest(*tasks) for row in each if row is not None):
        found.setdefault(str(row.where), row)
    return found


def nothing_at(row: Row) -> Row:
    """The row of a model that was not judged in this place."""
    return replace(row, value=math.nan, low=math.nan, high=math.nan, n=0, correct=None, values=[])


def _place(model: dict[str, Any], recipes: Sequence[Recipe]) -> tuple[str, int | None]:
    """The column and seed of a model: those of the run in its folder, or in one of the same name on another machine."""
    folder, oracle = Path(model["folder"]), ORACLE if model["name"].endswith(ORACLE) else ""
    runs = [(recipe, seed, run.folder) for recipe in recipes for seed, run in recipe.runs.items()]
    found = [one for one in runs if one[2].resolve() == folder.resolve()]
    found = found or [one for one in runs if one[2].resolve().name == folder.name]
    if len(found) == 1:
        return found[0][0].name + oracle, found[0][1]
    taken = any(recipe.name == model["name"].removesuffix(ORACLE) for recipe in recipes)
    return (str(folder) + oracle if taken else model["name"]), None


def _check_same(task: str, one: dict[str, Any], other: dict[str, Any], first: Path, second: Path) -> None:
    for key in sorted(one.keys() | other.keys()):
        if key not in FREE and one.get(key) != other.get(key):
            raise ValueError(
                f"{task} has {key}={one.get(key)!r} in {first} and {key}={other.get(key)!r} in {second}: models "
                "compare where they answer the same questions"
            )


def _union(one: Any, other: Any) -> Any:
    """Of lengths, or the one that both have."""
    if one == other:
        return one
    parts = [part for each in (one, other) for part in (each if isinstance(each, list | tuple) else [each])]
    return sorted(set(parts))
