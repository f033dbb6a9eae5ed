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

from nsa.config import NSAConfig
from nsa.eval.blocks import keys_per_query
from nsa.eval.models import Candidate, load
from nsa.eval.pictures import Curve, KeysRead
from nsa.eval.report import Report
from nsa.eval.result import Result, paired_difference
from nsa.eval.runner import result_of
from nsa.eval.tasks import Needle, Perplexity, Recall, Row, Task
from nsa.eval.tasks.recall import BEYOND, INSIDE, OUT_OF_REACH
from nsa.eval.twins import processes_for, train_and_judge
from nsa.training.config import CONFIG_FILE, TrainConfig, differences
from nsa.training.presets import preset

if TYPE_CHECKING:
    from nsa.eval.command import DemoArguments

Attention = Literal["nsa", "dense", "window"]
TWINS: tuple[Attention, ...] = ("nsa", "dense", "window")
COLUMNS = (
    "held-out\nloss", "less\ndense's", "recall in\nwindow", "recall\nbeyond", "recall out\nof reach", "keys per\nquery",
    "ms per\nstep",
)  # fmt: skip


def demo(arguments: DemoArguments) -> None:
    """Train what is not trained yet, judge, print, write."""
    console, out = Console(), arguments.output
    if arguments.processes < 0:
        raise ValueError(f"--processes should be 0 (as many as there are cores) or more, got {arguments.processes}")
    recipes: dict[str, TrainConfig] = {
        twin: recipe(out, twin, steps=arguments.steps, seed=arguments.seed) for twin in TWINS
    }
    if arguments.overwrite:
        forget(out)
    check_same_settings(recipes)
    if (out / "demo.json").exists():
        show(json.loads((out / "demo.json").read_text(encoding="utf-8")), console)
        console.print(f"These results were there already; --overwrite trains again.\nreport: {out / 'report.html'}")
        return
    try:
        tasks = tasks_for(recipes["nsa"], arguments.seed)
        rows = train_and_judge(recipes, tasks, arguments.processes or processes_for(len(recipes)), console)
        candidates = [load(config.out, name=twin) for twin, config in recipes.items()]
        report = describe(candidates, result_of(candidates, tasks, rows), recipes["nsa"])
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; the same command goes on where it was ({out})") from None
    summary = summarize(report)
    report.save(out / "report.html")
    save(summary, out / "demo.json")
    show(summary, console)
    console.print(f"report: {out / 'report.html'}", highlight=False)


def recipe(out: Path, twin: Attention, *, steps: int | None, seed: int) -> TrainConfig:
    """The demo preset for one twin; `steps` shortens or lengthens every stage of its curriculum alike."""
    config = replace(preset("demo"), out=out / twin, attention=twin, seed=seed, save_every=200, keep_checkpoints=1)
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
        changed = differences(json.loads(path.read_text(encoding="utf-8")), config) if path.exists() else []
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


def tasks_for(config: TrainConfig, seed: int) -> list[Task]:
    """The demo's questions, up to the length that the twins were trained on."""
    length = config.context
    return [
        Recall(
            length=length, window_size=config.nsa.window_size, num_layers=config.num_layers, hops=(1,), samples=100,
            seed=seed,
        ),
        Perplexity(length=length, samples=64),
        Needle(lengths=(length // 4, length // 2, length), samples=6, seed=seed),
    ]  # fmt: skip


def describe(candidates: list[Candidate], result: Result, config: TrainConfig) -> Report:
    """The report, with the demo's own words at its top."""
    report = Report.of(
        candidates,
        result,
        text="python",
        title="Three attentions, one model",
        lead=f"Three small language models that differ in their attention only, trained for {config.total_steps} steps "
        "each on this machine's Python sources, and judged on packages and names that none of them has seen.",
    )
    rows = {name: recall_of(result, name) for name in result.names}
    far = {name: found.get(OUT_OF_REACH) or found[BEYOND] for name, found in rows.items()}
    loss = {name: result.of_task(name, Perplexity.name)[0] for name in result.names}
    difference, error = paired_difference(loss["nsa"], loss["dense"])
    report.tiles = [
        (
            f"{far['nsa'].value:.0%}",
            f"of the values that no window reaches are found by NSA; by dense attention {far['dense'].value:.0%}, "
            f"by windows alone {far['window'].value:.0%}",
        ),
        (f"{difference:+.3f}", f"nats per token: NSA's loss on held-out text less dense attention's, ± {error:.3f}"),
        (
            f"{keys_of('nsa', config.nsa, config.context, report.keys):,.0f} of {config.context:,}",
            f"keys are read by NSA's query at the end of a text of {config.context:,} tokens",
        ),
    ]
    return report


def summarize(report: Report) -> dict[str, Any]:
    """demo.json: the table's rows, a sample, and the whole result."""
    result = report.result
    reference = result.of_task("dense", Perplexity.name)[0]
    length = result.tasks[Perplexity.name]["length"]
    table = {}
    for model in result.models:
        name = model["name"]
        loss, recall = result.of_task(name, Perplexity.name)[0], recall_of(result, name)
        difference, error = paired_difference(loss, reference)
        table[name] = {
            "loss": loss.value,
            "loss_error": loss.error,
            "difference": difference,
            "difference_error": error,
            "recall": {region: [row.correct, row.n, row.low, row.high] for region, row in recall.items()},
            "keys_per_query": keys_of(name, NSAConfig.from_dict(model["nsa"]), length, report.keys),
            "context": length,
            "seconds_per_step": report.curves.get(name, Curve()).seconds_per_step,
        }
    prompt, text = report.samples["nsa"]
    return {"table": table, "sample": {"prompt": prompt, "text": text}, "result": json.loads(result.to_json())}


def show(summary: dict[str, Any], console: Console) -> None:
    """The one table, and a sample of NSA's text."""
    context = next(iter(summary["table"].values()))["context"]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", title_justify="left")
    table.title = f"Twins on held-out Python sources, {context} tokens"
    for column in ("", *COLUMNS):
        table.add_column(column, justify="right" if column else "left")
    for name, row in summary["table"].items():
        recall = [_recall_cell(row["recall"].get(region)) for region in (INSIDE, BEYOND, OUT_OF_REACH)]
        difference = "" if name == "dense" else _two_lines(f"{row['difference']:+.3f}", row["difference_error"])
        time = "" if row["seconds_per_step"] is None else f"{1000 * row['seconds_per_step']:.0f}"
        table.add_row(
            name,
            _two_lines(f"{row['loss']:.3f}", row["loss_error"]),
            difference,
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
    console.print("\n[bold]NSA goes on after[/bold] [dim](held-out file)[/dim]")
    console.print(sample["prompt"], style="dim", end="", markup=False, highlight=False)
    console.print(sample["text"] + "\n", markup=False, highlight=False)


def recall_of(result: Result, name: str) -> dict[str, Row]:
    return {row.where["region"]: row for row in result.of_task(name, Recall.name)}


def keys_of(attention: str, config: NSAConfig, context: int, read: KeysRead | None) -> float:
    """Counted in the model for NSA, by definition for the others."""
    if attention == "nsa" and read is not None:
        return read.counted[-1]
    return keys_per_query(attention, config, context)


def save(summary: dict[str, Any], path: Path) -> None:
    """Whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)


def _two_lines(value: str, error: float) -> str:
    return f"{value}\n[dim]± {error:.3f}[/dim]"


def _recall_cell(found: list[float] | None) -> str:
    if found is None:
        return "–"
    correct, n, low, high = found
    return f"{correct / n:.0%}\n[dim]{100 * low:.0f}-{high:.0%}[/dim]"
