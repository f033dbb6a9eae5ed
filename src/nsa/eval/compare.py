"""`nsa compare`: methods and trained models x lengths x tasks, a line of rows.jsonl a finished cell; tables, report."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from nsa.eval.compare_cells import Cell, cells_of
from nsa.eval.compare_rows import append, read_finished
from nsa.eval.compare_run import Prepared, remember, run_apart, run_here
from nsa.eval.compare_table import comparison_markdown, comparison_tables
from nsa.eval.compared import Compared, load_compared
from nsa.eval.costs import Cost, Costs
from nsa.eval.files import make_writable, read_object, refuse_to_lose
from nsa.eval.methods import METHODS, split
from nsa.eval.methods.nsa import keys_of_last
from nsa.eval.models import check_folder
from nsa.eval.report import Report
from nsa.eval.report_charts import colors_of, quality_charts
from nsa.eval.result import Result
from nsa.eval.runner import circumstances, too_long
from nsa.eval.tasks import TASKS, Row
from nsa.eval.tasks.lm_eval import PREFIX
from nsa.files import write_whole
from nsa.report.charts import as_file
from nsa.training.folder import DATA_FILE

if TYPE_CHECKING:
    from nsa.eval.arguments import CompareArguments


WRITTEN = ("compare.json", "report.html", "tables.md", "quality.svg")  # after the rows
# Which of the report's colours a method takes; the others take the remaining ones.
TWIN_OF = {"nsa": "nsa", "full": "dense", "streaming_llm": "window"}


def compare(arguments: CompareArguments) -> Result:
    """Check, load, run what is not finished, print, write."""
    check(arguments)
    compared = load_compared(arguments)
    cells = list(cells_of(arguments, compared))
    make_writable(arguments.output)
    path = arguments.output / "rows.jsonl"
    path.open("ab").close()
    finished = read_finished(path)
    todo = [cell for cell in cells if cell.key not in finished]
    console = Console(stderr=True, markup=False, emoji=False)
    if len(todo) < len(cells):
        print(f"{len(cells) - len(todo)} of {len(cells)} cells are finished in {path}", file=sys.stderr)
    prepared: Prepared = {}
    for cell in cells:
        remember(prepared, cell, finished.get(cell.key, {}))
    apart = arguments.processes > 1 and len(todo) > 1
    running = run_apart(todo, arguments, prepared, console) if apart else run_here(todo, compared, prepared, console)
    try:
        with closing(running):  # its bars go before an error's line comes
            for record in running:
                append(path, record)
                finished[record["key"]] = record
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"the same command goes on where it was ({path})") from None
    records = [finished[cell.key] for cell in cells]
    result, costs = gather(arguments, compared, cells, records)
    written = json.dumps({**json.loads(result.to_json()), **costs.plain()}, indent=1)
    write_whole(arguments.output / "compare.json", written + "\n")
    title = f"Attention methods on {compared.model.name}"
    lead = "The same weights, the same prompts, one budget of keys read per query."
    if compared.trained:
        lead += " Trained models answer the same prompts with weights and an attention of their own."
    Report(result=result, title=title, lead=lead, costs=costs).save(arguments.output / "report.html")
    charts = quality_charts(result, costs, colors_of(result))
    write_whole(arguments.output / "tables.md", comparison_markdown(result, costs))
    write_whole(arguments.output / "quality.svg", as_file(charts))
    if arguments.json:
        print(written)
        return result
    out = Console(markup=False, emoji=False)
    out.print(comparison_tables(result, costs))
    for note in result.notes:
        out.print(f"note: {note}", style="yellow", highlight=False, soft_wrap=True)
    print(f"wrote {arguments.output / 'report.html'}", file=sys.stderr)
    return result


def check(arguments: CompareArguments) -> None:
    """One clear line for what can be seen to be wrong before a model is loaded."""
    for folder in (arguments.model, *arguments.trained):
        check_folder(folder)
    ours = (arguments.output / "rows.jsonl").is_file()
    refuse_to_lose(arguments.output, *(() if ours else WRITTEN), unless="")
    unknown = [name for name in arguments.methods if name not in METHODS]
    if unknown:
        raise ValueError(f"unknown method {', '.join(unknown)}; expected some of {', '.join(METHODS)}")
    unknown = [name for name in arguments.tasks if name not in TASKS and not name.startswith(PREFIX)]
    if unknown or not arguments.tasks:
        expected = f"{', '.join(TASKS)}, {PREFIX}NAME"
        raise ValueError(f"unknown task {', '.join(unknown) or '(none)'}; expected some of {expected}")
    if not arguments.lengths or min(arguments.lengths) < 1:
        raise ValueError(f"lengths must be positive token counts, got {list(arguments.lengths)}")
    if arguments.processes < 1:
        raise ValueError(f"expected at least 1 of --processes, got {arguments.processes}")
    for repeated in (arguments.methods, arguments.tasks, arguments.lengths):
        if len(set(repeated)) < len(repeated):
            raise ValueError(f"named twice: {' '.join(map(str, repeated))}")


def gather(
    arguments: CompareArguments, compared: Compared, cells: Sequence[Cell], records: Sequence[dict[str, Any]]
) -> tuple[Result, Costs]:
    """Methods as the models of a result; cells without memory as rows without samples, and a note."""
    methods = {cell.row: cell for cell in cells}
    rows: dict[str, list[Row]] = {name: [] for name in methods}
    tasks: dict[str, dict[str, Any]] = {}
    notes = []
    known = {
        (cell.length, cell.task.name): record["rows"]
        for cell, record in zip(cells, records, strict=True)
        if record["status"] == "ok"
    }
    for cell, record in zip(cells, records, strict=True):
        if record["status"] == "ok":
            rows[cell.row] += [Row.from_dict(row) for row in record["rows"]]
        else:
            notes.append(f"{cell.name} tokens: {record['status']}")
            nothing = {"value": float("nan"), "low": float("nan"), "high": float("nan"), "n": 0, "values": []}
            same = known.get((cell.length, cell.task.name), [])
            rows[cell.row] += [Row.from_dict({**row, **nothing, "correct": None}) for row in same]
        parameters = tasks.setdefault(cell.task.name, dict(cell.identity["parameters"]))
        lengths = sorted({c.length for c in cells})
        parameters.update({key: lengths for key in ("length", "lengths") if key in parameters})
    order = {name: place for place, name in enumerate(tasks)}
    for own in rows.values():
        own.sort(key=lambda row: order[row.task])  # stable: lengths stay in their order
    description = compared.model.describe()
    laid_over = [cell.row for cell in methods.values() if cell.folder == arguments.model]
    models = [{**description, "name": name, "attention": TWIN_OF.get(name, name), "nsa": {}} for name in laid_over]
    models += [candidate.describe() for candidate in compared.trained]
    asked = [cell.task for cell in cells]
    notes += [note for one in (compared.model, *compared.trained) if (note := too_long(one, asked))]
    notes += notes_on_trained(arguments, compared)
    notes.append(
        "perplexity is one prefill: methods that are sparse in decode alone are dense there; questions, answers and "
        "continuations are decode steps"
    )
    each = [Cost.of(cell.row, cell.method, cell.length, record) for cell, record in zip(cells, records, strict=True)]
    budgets = {length: split(length, compared.budget(arguments.budget, length)).total for length in arguments.lengths}
    whose = compared.trained[0].name if compared.trained and arguments.budget is None else ""
    costs = Costs.of(each, budgets, whose)
    for candidate in compared.trained:
        for cost in costs.rows:
            if cost.method == candidate.name:
                cost.sizes = candidate.describe()["nsa"]
    notes += notes_on_budgets(costs)
    run = {**circumstances(), "model": description["folder"]}
    return Result(models=models, tasks=tasks, rows=rows, run=run, notes=notes), costs


def notes_on_trained(arguments: CompareArguments, compared: Compared) -> list[str]:
    """What a reader must know to set trained models beside methods that were laid over another one's weights."""
    notes = []
    for candidate in compared.trained:
        if candidate.num_parameters != compared.model.num_parameters:
            counts = f"{candidate.num_parameters:,} parameters, {compared.model.name} {compared.model.num_parameters:,}"
            notes.append(f"{candidate.name} has {counts}")
        data = [digest_of_data(one.folder) for one in (candidate, compared.model)]
        if None not in data and data[0] != data[1]:
            notes.append(f"{candidate.name} was trained on other data than {compared.model.name}")
        keys = {length: keys_of_last(candidate.config, length) for length in arguments.lengths}
        for length in sorted(length for length, read in keys.items() if read >= length):
            notes.append(
                f"{candidate.name} reads {keys[length]:,} keys at {length:,} tokens, which spares none of them"
            )
    return notes


def digest_of_data(folder: Path) -> str | None:
    """Of what a run of `nsa train` in a folder was trained on; None where it does not say."""
    file = folder / DATA_FILE
    return read_object(file, "the digests of a run's data").get("data") if file.is_file() else None


def notes_on_budgets(costs: Costs) -> list[str]:
    """Who reads more than the budget in decode, a note a length: layers or phases are dense by a method's own rules."""
    notes = []
    for length in costs.lengths():
        here = [cost for cost in costs.rows if cost.length == length and cost.sparse_in]
        read = {cost.method: cost.per_query("attended", "decode") or 0.0 for cost in here}
        above = [f"{name} {keys:,.0f}" for name, keys in read.items() if keys > 1.02 * costs.budgets[length]]
        if above:
            budget = f"{costs.budgets[length]:,} keys at {length:,} tokens"
            notes.append(f"above the budget of {budget}, by their own rules or sizes, in decode: {', '.join(above)}")
    return notes
