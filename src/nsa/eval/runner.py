"""Models x tasks -> a result: `nsa eval`, and the judging half of `nsa demo`."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nsa.eval.files import make_writable, read_object, refuse_to_lose
from nsa.eval.models import Candidate, check_folder, load, names_of
from nsa.eval.report import Report
from nsa.eval.result import Result
from nsa.eval.table import result_tables
from nsa.eval.tasks import PUZZLES, TASKS, Continuation, MultiValue, Needle, Perplexity, Recall, Row, Task
from nsa.eval.text import TEXT_FIELD, held_out_of
from nsa.methods.oracle import selection_by_mass
from nsa.methods.registry import TRAINED
from nsa.training.config import CONFIG_FILE

if TYPE_CHECKING:
    from nsa.eval.arguments import EvalArguments


def judge(arguments: EvalArguments) -> Result:
    """`nsa eval`: check everything that can be checked at once, load, run, print, write."""
    unknown = [task for task in arguments.tasks if task not in TASKS]
    if unknown or not arguments.tasks:
        raise ValueError(f"unknown task {', '.join(unknown) or '(none)'}; expected some of {', '.join(TASKS)}")
    if not arguments.models:
        raise ValueError("name at least one model's folder")
    for folder in arguments.models:
        check_folder(folder)
    if arguments.output is not None:
        written = [] if arguments.overwrite else ["eval.json", "report.html"]
        refuse_to_lose(arguments.output, *written, unless=", or --overwrite")
    text = text_of(arguments.text, arguments.models)

    names = names_of(list(arguments.models))
    candidates = [
        load(
            folder,
            name=name,
            device=arguments.device,
            dtype=arguments.dtype,
            trust_remote_code=arguments.trust_remote_code,
        )
        for folder, name in zip(arguments.models, names, strict=True)
    ]
    if arguments.oracle:
        made_sparse = [name for name, method in TRAINED.items() if method.is_sparse]
        sparse = [candidate for candidate in candidates if candidate.attention in made_sparse]
        if not sparse:
            found = ", ".join(f"{candidate.name} has {candidate.attention!r}" for candidate in candidates)
            expected = " or ".join(map(repr, made_sparse))
            raise ValueError(f"--oracle is for models with attention={expected}; {found}")
        candidates += [replace(candidate, name=f"{candidate.name}, oracle", by_mass=True) for candidate in sparse]
    tasks = tasks_of(arguments, candidates)
    if arguments.output is not None:
        make_writable(arguments.output)
    result = evaluate(candidates, tasks)
    if arguments.output is not None:  # before anything is printed: a terminal may be gone by now
        result.save(arguments.output / "eval.json")
        own = [candidate for candidate in candidates if not candidate.by_mass]
        Report.of(own, result, text=text).save(arguments.output / "report.html")
    if arguments.json:
        print(result.to_json())
    else:
        console = Console(markup=False, emoji=False)
        console.print(result_tables(result))
        for note in result.notes:
            console.print(f"note: {note}", style="yellow", highlight=False, soft_wrap=True)
    if arguments.output is not None:
        print(f"wrote {arguments.output / 'report.html'}", file=sys.stderr)
    return result


def tasks_of(arguments: EvalArguments, candidates: Sequence[Candidate]) -> list[Task]:
    """The tasks asked for; what was not given follows from the models."""
    configs: list[Any] = [candidate.config for candidate in candidates]
    positions = min(getattr(config, "max_position_embeddings", None) or 1024 for config in configs)
    lengths = arguments.lengths or tuple(sorted({positions // 4, positions // 2, positions}))
    sizes = [
        getattr(config, str(getattr(config, "attention", None)), None) or getattr(config, "nsa", None)
        for config in configs
    ]
    windows = [found["window_size"] for found in sizes if found]
    window_size = arguments.window_size if arguments.window_size is not None else (windows or [512])[0]
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
        TextColumn("{task.description}", markup=False),
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
        try:
            with selection_by_mass() if candidate.by_mass else nullcontext():
                rows += task.run(candidate.model, candidate.tokenizer, partial(progress.advance, bar))
        except IndexError as error:  # of a table of positions
            if reason := too_long(candidate, [task]):
                raise ValueError(f"{reason}: {error}") from error
            raise
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
    sources = set()
    for file in (folder / CONFIG_FILE for folder in folders):
        if file.is_file():
            run = read_object(file, "the configuration of a run of `nsa train`")
            source, text_field = run.get("data"), run.get("text_field", TEXT_FIELD)
            if not isinstance(source, str) or not isinstance(text_field, str):
                raise ValueError(f"{file} does not say what text the model was trained on; name a text with --text")
            sources.add(held_out_of(source, text_field))
    if len(sources) > 1:
        raise ValueError(f"the models held out {', '.join(sorted(sources))}; name a text for all with --text")
    return next(iter(sources), "python")


def notes_on(candidates: Sequence[Candidate], tasks: Sequence[Task]) -> list[str]:
    """What a reader must know to read the numbers rightly."""
    notes = []
    vocabularies = {frozenset(candidate.tokenizer.get_vocab().items()) for candidate in candidates}
    if len(vocabularies) > 1:
        notes.append("the models have different tokenizers: neither prompts nor losses per token are comparable")
    candidates = [candidate for candidate in candidates if not candidate.by_mass]  # an oracle is the model it is of
    counts = {candidate.name: candidate.num_parameters for candidate in candidates}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        notes.append(f"the models differ in size: {listed} parameters")
    return notes + [note for candidate in candidates if (note := too_long(candidate, tasks))]


def circumstances() -> dict[str, Any]:
    """Command, date, versions and hardware: the origin of every number of a result."""
    import nsa

    packages = {"nsa": nsa.__version__}
    for package in ("torch", "transformers", "tokenizers"):
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = "not installed"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU only"
    return {
        "command": shlex.join([os.path.basename(sys.argv[0]).replace("__main__.py", "nsa"), *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": {"python": platform.python_version(), **packages},
        "hardware": {
            "processor": _processor(),
            "threads": torch.get_num_threads(),
            "device": device,
            "system": f"{platform.system()} {platform.machine()}",
        },
    }


def too_long(candidate: Candidate, tasks: Sequence[Task]) -> str:
    """That the tasks' texts are longer than the model was made for; "" if they are not, or if nothing is known."""
    limit = getattr(candidate.config, "max_position_embeddings", None)
    longest = max((max(_lengths(task)) for task in tasks), default=0)
    if not limit or longest <= limit:
        return ""
    return f"{candidate.name}: {longest} tokens are more than the {limit} positions it was made for"


def _lengths(task: Task) -> Sequence[int]:
    parameters = asdict(task)  # type: ignore[call-overload]
    return parameters.get("lengths") or (parameters.get("length", 0),)


def _processor() -> str:
    """The processor's name where the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        return platform.processor()
