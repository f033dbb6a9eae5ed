"""`nsa report`: runs of nsa train, and what nsa eval judged of them, on one page."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from nsa.eval.arguments import ReportArguments
from nsa.eval.recipes import LOSSES, Recipe, read_recipes
from nsa.eval.report import Report
from nsa.eval.report_charts import marked
from nsa.eval.result import Result
from nsa.files import write_whole
from nsa.report.charts import Series, line_chart
from nsa.report.table import Table

TITLES = {"eval_text_loss": "On held-out text", "eval_retrieval_loss": "On answers to be looked up"}


@dataclass(frozen=True, kw_only=True)
class Recipes:
    """The page's first section."""

    legend: list[tuple[str, str]]
    charts: list[tuple[str, str]]
    table: Table


def report(arguments: ReportArguments) -> None:
    """The page, and its table in the terminal, or all of it as JSON."""
    recipes = read_recipes(arguments.runs)
    reference = _reference(recipes, arguments.reference)
    result = _judged(arguments.eval)
    found = table(recipes, reference)
    if arguments.output is not None:
        colors = colors_of(recipes)
        section = Recipes(
            legend=[(recipe.name, colors[recipe.name]) for recipe in recipes],
            charts=charts(recipes, colors),
            table=found,
        )
        page = Report(result=result, recipes=section, title=arguments.title)
        write_whole(arguments.output, page.render())
    if arguments.json:
        print(json.dumps([_plain(recipe) for recipe in recipes], indent=1))
    elif arguments.markdown:
        print(found.markdown())
    else:
        Console(markup=False, emoji=False).print(found.rich())
    if arguments.output is not None:
        print(f"wrote {arguments.output}", file=sys.stderr)


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
        speed = sum(run.tokens_per_second for run in runs) / len(runs)
        minutes = sum(run.minutes for run in runs) / len(runs)
        rows.append([*row, f"{speed:,.0f}", f"{minutes:.1f}"])
    return Table("Runs of nsa train", [*header, "tokens/s", "minutes"], rows)


def _difference(recipe: Recipe, reference: Recipe, loss: str) -> str:
    """With its standard error over seeds, where there are two; after how many tokens, where they are not the last."""
    found = recipe.against(reference, loss)
    if found is None:
        return "no shared seed"
    mean, error, seeds, tokens = found
    text = f"{mean:+.4f}" + (f" ± {error:.4f}" if seeds > 1 else "")
    last = max(recipe.curve(loss), default=tokens)
    return text if tokens == last else f"{text} at {tokens / 1e6:,.1f}M"


def charts(recipes: Sequence[Recipe], colors: Mapping[str, str]) -> list[tuple[str, str]]:
    """Losses by tokens: the mean over seeds, and the band from the lowest to the highest of them."""
    found = []
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
            chart = line_chart(series, title=title, x_label="million tokens", y_label="nats per token")
            found.append((title, chart))
    return marked(found)


def colors_of(recipes: Sequence[Recipe]) -> dict[str, str]:
    """The first recipe of NSA, dense and window has its own; others take the remaining ones in turn."""
    colors: dict[str, str] = {}
    others = 0
    for recipe in recipes:
        color = f"var(--{recipe.attention})" if recipe.attention in ("nsa", "dense", "window") else ""
        if not color or color in colors.values():
            color, others = f"var(--other-{others % 8})", others + 1
        colors[recipe.name] = color
    return colors


def _reference(recipes: Sequence[Recipe], name: str | None) -> Recipe | None:
    if name is None:
        return next((recipe for recipe in recipes if recipe.attention == "dense"), None) if len(recipes) > 1 else None
    for recipe in recipes:
        if recipe.name == name:
            return recipe
    raise ValueError(f"--reference {name}: expected one of {', '.join(recipe.name for recipe in recipes)}")


def _judged(path: Path | None) -> Result:
    if path is None:
        return Result(models=[], tasks={}, rows={})
    try:
        return Result.from_json(path.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is no eval.json of `nsa eval`: {reason}") from error


def _plain(recipe: Recipe) -> dict[str, Any]:
    runs = [
        {
            "seed": seed,
            "folder": str(run.folder),
            "tokens_per_second": run.tokens_per_second,
            "minutes": run.minutes,
            **{name: {str(tokens): value for tokens, value in losses.items()} for name, losses in run.losses.items()},
        }
        for seed, run in recipe.runs.items()
    ]
    return {"recipe": recipe.name, "attention": recipe.attention, "runs": runs}
