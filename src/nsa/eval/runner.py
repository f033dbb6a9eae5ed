"""Models x tasks -> a result: `nsa eval`, and the judging half of `nsa demo`."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nsa.eval.models import Candidate, check_folder, load, names_of
from nsa.eval.report import Report
from nsa.eval.result import Result
from nsa.eval.table import rich_table
from nsa.eval.tasks import PUZZLES, TASKS, Continuation, MultiValue, Needle, Perplexity, Recall, Row, Task
from nsa.eval.text import HELD_OUT
from nsa.training.config import CONFIG_FILE

if TYPE_CHECKING:
    from nsa.eval.command import EvalArguments


def judge(arguments: EvalArguments) -> Result:
    """`nsa eval`: check everything that can be checked at once, load, run, print, write."""
    unknown = [task for task in arguments.tasks if task not in TASKS]
    if unknown or not arguments.tasks:
        raise ValueError(f"unknown task {', '.join(unknown) or '(none)'}; expected some of {', '.join(TASKS)}")
    if not arguments.models:
        raise ValueError("name at least one model's folder")
    for folder in arguments.models:
        check_folder(folder)
    if arguments.output is not None and (arguments.output / "eval.json").exists() and not arguments.overwrite:
        raise ValueError(f"{arguments.output} already holds an eval.json; give another --output, or --overwrite")

    names = names_of(list(arguments.models))
    candidates = [
        load(folder, name=name, device=arguments.device, dtype=arguments.dtype)
        for folder, name in zip(arguments.models, names, strict=True)
    ]
    result = evaluate(candidates, tasks_of(arguments, candidates))
    if arguments.json:
        print(result.to_json())
    else:
        console = Console()
        console.print(rich_table(result))
        for note in result.notes:
            console.print(f"note: {note}", style="yellow")
    if arguments.output is not None:
        result.save(arguments.output / "eval.json")
        report = Report.of(candidates, result, text=text_of(arguments.text, arguments.models))
        report.save(arguments.output / "report.html")
        Console(stderr=True).print(f"wrote {Path(arguments.output, 'report.html')}", highlight=False)
    return result


def tasks_of(arguments: EvalArguments, candidates: Sequence[Candidate]) -> list[Task]:
    """The tasks asked for; what was not given follows from the models."""
    configs: list[Any] = [candidate.model.config for candidate in candidates]
    positions = min(getattr(config, "max_position_embeddings", 1024) for config in configs)
    lengths = arguments.lengths or tuple(sorted({positions // 4, positions // 2, positions}))
    windows = [config.nsa["window_size"] for config in configs if getattr(config, "nsa", None)]
    window_size = arguments.window_size or (windows[0] if windows else 512)
    shared: dict[str, Any] = {"text": text_of(arguments.text, arguments.models)}
    if arguments.samples is not None:
        shared["samples"] = arguments.samples
    made: dict[str, Any] = {
        Needle.name: lambda: Needle(lengths=lengths, depths=arguments.depths, seed=arguments.seed, **shared),
        Recall.name: lambda: Recall(
            length=max(lengths),
            window_size=window_size,
            num_layers=max(config.num_hidden_layers for config in configs),
            num_keys=arguments.keys,
            hops=arguments.hops,
            seed=arguments.seed,
            **shared,
        ),
        Perplexity.name: lambda: Perplexity(length=max(lengths), **shared),
        MultiValue.name: lambda: MultiValue(length=max(lengths), seed=arguments.seed, **shared),
        Continuation.name: lambda: Continuation(length=max(lengths), **shared),
    }
    for name, puzzle in PUZZLES.items():
        made[name] = partial(puzzle, lengths=lengths, seed=arguments.seed, **shared)
    return [made[name]() for name in arguments.tasks]


def evaluate(candidates: Sequence[Candidate], tasks: Sequence[Task], *, console: Console | None = None) -> Result:
    """Run every task on every model; progress goes to `console` (stderr by default)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console or Console(stderr=True), transient=True) as progress:
        rows = {candidate.name: run_tasks(candidate, tasks, progress) for candidate in candidates}
    return result_of(candidates, tasks, rows)


def run_tasks(candidate: Candidate, tasks: Sequence[Task], progress: Progress) -> list[Row]:
    """The rows of one model, with a bar for each task."""
    rows: list[Row] = []
    for task in tasks:
        bar = progress.add_task(f"{candidate.name}: {task.name}", total=task.num_steps(candidate.tokenizer))
        rows += task.run(candidate.model, candidate.tokenizer, _advance(progress, bar))
        progress.remove_task(bar)
    return rows


def result_of(candidates: Sequence[Candidate], tasks: Sequence[Task], rows: dict[str, list[Row]]) -> Result:
    """The rows of all models with what they were asked, and the circumstances."""
    return Result(
        models=[candidate.describe() for candidate in candidates],
        tasks={task.name: asdict(task) for task in tasks},  # type: ignore[call-overload]
        rows=rows,
        run=circumstances(),
        notes=notes_on(candidates, tasks),
    )


def text_of(asked: Path | None, folders: Sequence[Path]) -> str:
    """The text asked for; else what the training of these models held out; else the `python` corpus' held-out part."""
    if asked is not None:
        return str(asked)
    sources = {json.loads(file.read_text())["data"] for f in folders if (file := f / CONFIG_FILE).is_file()}
    if len(sources) > 1:
        raise ValueError(f"the models were trained on {', '.join(sorted(sources))}; name a text for all with --text")
    source = next(iter(sources), "python")
    return source if source == "python" else source + HELD_OUT


def notes_on(candidates: Sequence[Candidate], tasks: Sequence[Task]) -> list[str]:
    """What a reader must know to read the numbers rightly."""
    notes = []
    vocabularies = {frozenset(candidate.tokenizer.get_vocab().items()) for candidate in candidates}
    if len(vocabularies) > 1:
        notes.append("the models have different tokenizers: neither prompts nor losses per token are comparable")
    counts = {candidate.name: candidate.num_parameters for candidate in candidates}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        notes.append(f"the models differ in size: {listed} parameters")
    for candidate in candidates:
        config: Any = candidate.model.config
        limit = getattr(config, "max_position_embeddings", None)
        longest = max((max(_lengths(task)) for task in tasks), default=0)
        if limit is not None and longest > limit:
            notes.append(f"{candidate.name}: {longest} tokens are more than the {limit} positions it was made for")
    return notes


def circumstances() -> dict[str, Any]:
    """Command, date, versions and hardware: the origin of every number of a result."""
    packages = {}
    for package in ("nsa", "torch", "transformers", "tokenizers"):
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = "not installed"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU only"
    return {
        "command": shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": {"python": platform.python_version(), **packages},
        "hardware": {
            "processor": _processor(),
            "threads": torch.get_num_threads(),
            "device": device,
            "system": f"{platform.system()} {platform.machine()}",
        },
    }


def _lengths(task: Task) -> Sequence[int]:
    parameters = asdict(task)  # type: ignore[call-overload]
    return parameters.get("lengths") or (parameters.get("length", 0),)


def _advance(progress: Progress, bar: Any) -> Any:
    return lambda steps: progress.advance(bar, steps)


def _processor() -> str:
    """The processor's name where the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        return platform.processor()
