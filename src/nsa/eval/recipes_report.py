"""`nsa report`: runs of nsa train, what nsa eval judged of them, and a comparison of nsa compare, on one page."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from nsa.eval.arguments import ReportArguments
from nsa.eval.costs import Costs
from nsa.eval.judged import Judged, read_judged, read_result
from nsa.eval.judged_table import between, judged_blocks
from nsa.eval.recipes import LOSSES, Recipe, read_recipes
from nsa.eval.report import Report
from nsa.eval.result import Result
from nsa.files import write_whole
from nsa.report.charts import Charts, Series, colors_of, draw
from nsa.report.table import Table

TITLES = {"eval_text_loss": "On held-out text", "eval_retrieval_loss": "On answers to be looked up"}


@dataclass(frozen=True, kw_only=True)
class Recipes:
    """The page's first section; `settings` has what tells each recipe from the reference, or from the first."""

    legend: list[tuple[str, str]]
    charts: Charts
    tables: list[Table]
    settings: list[tuple[str, str]]


def report(arguments: ReportArguments) -> None:
    """The page, and its table in the terminal, or all of it as JSON."""
    recipes = read_recipes(arguments.runs)
    reference = _reference(recipes, arguments.reference)
    judged = read_judged(arguments.eval, recipes)
    compared = _compared(arguments.compare)
    tables = [table(recipes, reference), costs(recipes)]
    if arguments.output is not None:
        write_whole(arguments.output, page(arguments.title, recipes, reference, judged, compared).render())
    if arguments.json:
        print(json.dumps([_plain(recipe, judged) for recipe in recipes], indent=1))
    elif arguments.markdown:
        print("\n\n".join(found.markdown() for found in tables))
    else:
        Console(markup=False, emoji=False).print(*(found.rich() for found in tables))
    if arguments.output is not None:
        print(f"wrote {arguments.output}", file=sys.stderr)


def page(
    title: str,
    recipes: Sequence[Recipe],
    reference: Recipe | None,
    judged: Judged,
    compared: tuple[Path, Result, Costs] | None,
) -> Report:
    """Everything that was read, the runs first."""
    colors = colors_of((recipe.name, recipe.attention) for recipe in recipes)
    beside = reference or recipes[0]
    section = Recipes(
        legend=list(colors.items()),
        charts=charts(recipes, colors),
        tables=[table(recipes, reference), costs(recipes)],
        settings=[(recipe.name, settings_of(recipe, beside)) for recipe in recipes],
    )
    named = reference.name if reference else None
    result = judged.pooled(named)
    origins = [(str(path), of_file) for path, of_file in judged.files]
    others = [name for name in result.names if name not in colors]
    more = {name: f"var(--other-{(len(colors) + place) % 8})" for place, name in enumerate(others)}
    found = Report(
        result=result,
        recipes=section,
        title=title,
        blocks=judged_blocks(judged, named),
        seeds={name: len(column.rows) for name, column in judged.columns.items()},
        colors=colors | more,
        origins=origins,
    )
    if compared is not None:
        path, of_file, found.costs = compared
        found.compared = of_file
        found.origins = [*origins, (str(path), of_file)]
    return found


def table(recipes: Sequence[Recipe], reference: Recipe | None) -> Table:
    """A row a recipe: its last losses, mean and every seed's; and the paired difference from the reference."""
    header = ["recipe", "seeds", "tokens"]
    for name in LOSSES.values():
        header += [name, f"beside {reference.name}"] if reference else [name]
    rows = []
    for recipe in recipes:
        runs = recipe.runs.values()
        tokens = max((tokens for name in LOSSES for tokens in recipe.curve(name)), default=0)
        row = [recipe.name, str(len(runs)), f"{tokens / 1e6:,.1f}M"]
        for name in LOSSES:
            curve = recipe.curve(name)
            last = max(curve, default=None)
            each = " ".join(f"{run.losses[name][last]:.4f}" for run in runs) if last is not None else ""
            row.append("" if last is None else f"{curve[last][0]:.4f}" + (f" ({each})" if len(runs) > 1 else ""))
            if reference:
                row.append("" if recipe is reference else _difference(recipe, reference, name))
        rows.append(row)
    return Table("Runs of nsa train", header, rows)


def costs(recipes: Sequence[Recipe]) -> Table:
    """A row a recipe: keys that the last query of the longest row reads, tokens a second in training, all minutes."""
    rows = []
    for recipe in recipes:
        runs = list(recipe.runs.values())
        speed = sum(run.tokens_per_second for run in runs) / len(runs)
        minutes = sum(run.minutes for run in runs) / len(runs)
        keys = f"{runs[0].keys:,.0f} of {runs[0].context:,}"
        rows.append([recipe.name, keys, f"{speed:,.0f}", f"{minutes:.1f}"])
    return Table("What a run costs", ["recipe", "keys a query", "tokens/s", "minutes"], rows)


def _difference(recipe: Recipe, reference: Recipe, loss: str) -> str:
    """With its 95% t-interval over seeds, where there are two; after how many tokens, where they are not the last."""
    found = recipe.against(reference, loss)
    if found is None:
        return "no shared seed" if recipe.curve(loss) and reference.curve(loss) else ""
    differences, tokens = found
    text = between(differences) if len(differences) > 1 else f"{differences[0]:+.4f}"
    last = max(recipe.curve(loss), default=tokens)
    return text if tokens == last else f"{text} at {tokens / 1e6:,.1f}M"


def settings_of(recipe: Recipe, other: Recipe) -> str:
    """In words: what the other recipe has otherwise, and where the runs lie."""
    runs = ", ".join(f"seed {seed} in {run.folder}" for seed, run in sorted(recipe.runs.items()))
    if recipe is other:
        return f"{recipe.attention} attention, what the others are set against; {runs}"
    return f"{'; '.join(recipe.differs(other))}; {runs}"


def charts(recipes: Sequence[Recipe], colors: Mapping[str, str]) -> Charts:
    """Losses by tokens: the mean over seeds, and the band from the lowest to the highest of them."""
    found: Charts = []
    for loss, title in TITLES.items():
        series = []
        for recipe in recipes:
            curve = recipe.curve(loss)
            mean, low, high = zip(*curve.values(), strict=True) if curve else ((), (), ())
            x = [tokens / 1e6 for tokens in curve]
            series.append(
                Series(name=recipe.name, color=colors[recipe.name], x=x, y=mean, low=low, high=high, dots=True)
            )
        if any(s.x for s in series):
            found.append((title, draw(series, title=title, x_label="million tokens", y_label="nats per token")))
    return found


def _reference(recipes: Sequence[Recipe], name: str | None) -> Recipe | None:
    if name is None:
        return next((recipe for recipe in recipes if recipe.attention == "dense"), None) if len(recipes) > 1 else None
    for recipe in recipes:
        if recipe.name == name:
            return recipe
    raise ValueError(f"--reference {name}: expected one of {', '.join(recipe.name for recipe in recipes)}")


def _compared(path: Path | None) -> tuple[Path, Result, Costs] | None:
    """A compare.json; ValueError in one line for another file."""
    if path is None:
        return None
    result = read_result(path)
    try:
        return path, result, Costs.from_plain(json.loads(path.read_text(encoding="utf-8")))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} has no costs: expected the compare.json of a newer `nsa compare`; run it again, which takes what "
            "is in its rows.jsonl"
        ) from error


def _plain(recipe: Recipe, judged: Judged) -> dict[str, Any]:
    runs = [
        {
            "seed": seed,
            "folder": str(run.folder),
            "tokens_per_second": _finite(run.tokens_per_second),
            "minutes": run.minutes,
            "context": run.context,
            "keys_per_query": run.keys,
            **{name: {str(tokens): value for tokens, value in losses.items()} for name, losses in run.losses.items()},
            "judged": _judged_of(recipe.name, seed, judged),
        }
        for seed, run in recipe.runs.items()
    ]
    return {"recipe": recipe.name, "attention": recipe.attention, "runs": runs}


def _judged_of(name: str, seed: int, judged: Judged) -> list[dict[str, Any]]:
    column = judged.columns.get(name)
    rows = column.rows.get(seed, []) if column else []
    return [{"task": row.task, "where": row.where, "value": _finite(row.value), "n": row.n} for row in rows]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
