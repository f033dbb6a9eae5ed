"""`nsa demo`: three twins trained on this machine, judged on text they have not seen, one table, one report.

Nothing trained is ever lost: a twin that is finished is not trained again, one that was stopped goes on from its
last checkpoint, and finished results are shown, not replaced, unless --overwrite asks for it.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nsa.eval.files import make_writable, read_object, refuse_to_lose
from nsa.eval.regions import BEYOND, INSIDE, OUT_OF_REACH
from nsa.eval.twins import WORK, Rows, processes_for, train_and_judge
from nsa.eval.workers import Worker
from nsa.files import write_whole
from nsa.training.config import CONFIG_FILE, TrainConfig, differences
from nsa.training.presets import preset

if TYPE_CHECKING:
    from nsa.eval.arguments import DemoArguments

Attention = Literal["nsa", "dense", "window"]
TWINS: tuple[Attention, ...] = ("nsa", "dense", "window")
COLUMNS = (
    "held-out\nloss", "less\ndense's", "recall in\nwindow", "recall\nbeyond", "recall out\nof reach", "keys per\nquery",
    "ms per\nstep",
)  # fmt: skip


def demo(arguments: DemoArguments) -> None:
    """Train what is not trained yet, judge, print, write."""
    console, out = Console(markup=False, emoji=False), arguments.output
    if arguments.processes < 0:
        raise ValueError(f"--processes should be 0 (as many as there are cores) or more, got {arguments.processes}")
    recipes: dict[str, TrainConfig] = {
        twin: recipe(out, twin, steps=arguments.steps, seed=arguments.seed) for twin in TWINS
    }
    if arguments.overwrite:
        forget(out)
    check_same_settings(recipes)
    processes = arguments.processes or processes_for(len(recipes))
    if (out / "demo.json").exists():
        show(read_summary(out / "demo.json"), console)
        print(f"These results were there already; --overwrite trains again.\nreport: {out / 'report.html'}")
        return
    if not any((config.out / CONFIG_FILE).exists() for config in recipes.values()):
        refuse_to_lose(out, "report.html", unless="")
    make_writable(out)
    try:
        rows = train_and_judge(recipes, processes, console)
        summary = write_report(recipes, rows, out / "report.html", processes)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"the same command goes on where it was ({out})") from None
    save(summary, out / "demo.json")
    show(summary, console)
    print(f"report: {out / 'report.html'}")


def read_summary(path: Path) -> dict[str, Any]:
    """What an earlier demo found; ValueError in one line if another program wrote the file."""
    what = "the results of a demo"
    summary = read_object(path, what)
    try:
        show(summary, Console(quiet=True))
    except (AttributeError, IndexError, KeyError, StopIteration, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected {what}, got another JSON; --overwrite trains again") from error
    return summary


def write_report(recipes: dict[str, TrainConfig], rows: dict[str, Rows], path: Path, processes: int) -> dict[str, Any]:
    """The report and the summary; by a worker if workers have done all the rest."""
    if processes > 1:
        worker = Worker.start("the report", WORK, "write_report", recipes, rows, path)
        try:
            return worker.value()
        finally:
            worker.stop()
    from nsa.eval import demo_work

    return demo_work.write_report(recipes, rows, path)


def recipe(out: Path, twin: Attention, *, steps: int | None, seed: int) -> TrainConfig:
    """The demo preset for one twin; `steps` shortens or lengthens every stage of its curriculum alike."""
    config = replace(preset("demo"), out=out / twin, attention=twin, seed=seed, save_every=400, keep_checkpoints=1)
    if steps is None:
        return config
    if steps < 1:
        raise ValueError(f"--steps should be at least 1, got {steps}")
    share = steps / config.total_steps
    stages = (replace(stage, steps=max(1, round(stage.steps * share))) for stage in config.stages)
    return replace(config, curriculum=tuple(str(stage) for stage in stages))


def check_same_settings(recipes: dict[str, TrainConfig]) -> None:
    """One clear line if the folder holds twins of other settings: they would be judged beside strangers."""
    for config in recipes.values():
        path = config.out / CONFIG_FILE
        what = "the configuration of a run of `nsa train`"
        changed = differences(read_object(path, what), config) if path.exists() else []
        if changed:
            raise ValueError(
                f"{config.out} was trained with other settings ({'; '.join(changed)}); "
                "give another --output, or --overwrite"
            )


def forget(out: Path) -> None:
    """Remove what an earlier demo wrote, and nothing else."""
    for twin in TWINS:
        if (out / twin / CONFIG_FILE).exists():
            shutil.rmtree(out / twin)
    for name in ("demo.json", "report.html"):
        (out / name).unlink(missing_ok=True)


def show(summary: dict[str, Any], console: Console) -> None:
    """The one table, and a sample of NSA's text."""
    context = next(iter(summary["table"].values()))["context"]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", title_justify="left")
    table.title = f"Twins on held-out Python sources, {context} tokens"
    for column in ("", *COLUMNS):
        table.add_column(column, justify="right" if column else "left")
    for name, row in summary["table"].items():
        recall = [_recall_cell(row["recall"].get(region)) for region in (INSIDE, BEYOND, OUT_OF_REACH)]
        difference = _two_lines(f"{row['difference']:+.3f}", row["difference_error"])
        time = "" if row["seconds_per_step"] is None else f"{1000 * row['seconds_per_step']:.0f}"
        table.add_row(
            name,
            _two_lines(f"{row['loss']:.3f}", row["loss_error"]),
            "" if name == "dense" else difference,
            *recall,
            f"{row['keys_per_query']:.0f}",
            time,
        )
    console.print(table)
    console.print(
        "Loss in nats per token ± standard error. Recall of one of 4 values: the share of right answers and its 95% "
        "interval; beyond the window, and out of the reach of all layers' windows together.",
        style="dim",
    )
    sample = summary["sample"]
    console.print(Text.assemble("\n", ("NSA goes on after", "bold"), (" (held-out file)", "dim")))
    console.print(sample["prompt"], style="dim", end="", markup=False, highlight=False)
    console.print(sample["text"] + "\n", markup=False, highlight=False)


def save(summary: dict[str, Any], path: Path) -> None:
    write_whole(path, json.dumps(summary, indent=1, allow_nan=False) + "\n")


def _two_lines(value: str, error: float) -> Text:
    return Text.assemble(value, (f"\n± {error:.3f}", "dim"))


def _recall_cell(found: list[float] | None) -> Text:
    if found is None:
        return Text("–")
    correct, n, low, high = found
    return Text.assemble(f"{correct / n:.0%}", (f"\n{100 * low:.0f}-{high:.0%}", "dim"))
