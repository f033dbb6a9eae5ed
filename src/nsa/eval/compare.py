"""`nsa compare`: methods x lengths x tasks on one model, one line of rows.jsonl a finished cell, tables, a report."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from nsa.eval.compare_table import comparison_tables
from nsa.eval.costs import Cost, Costs
from nsa.eval.methods import METHODS, Method, split
from nsa.eval.methods.phased import Phased
from nsa.eval.models import Candidate, check_folder, load
from nsa.eval.report import Report
from nsa.eval.result import Result
from nsa.eval.runner import circumstances, text_of
from nsa.eval.tasks import TASKS, Continuation, MultiValue, Needle, Perplexity, Recall, Row, Task
from nsa.eval.tasks.lm_eval import PREFIX, LMEval
from nsa.eval.text import held_out_text
from nsa.training.tokenizer import encoder

if TYPE_CHECKING:
    from nsa.eval.compare_command import CompareArguments

# Which of the report's colours a method takes; the others take the remaining ones.
TWIN_OF = {"nsa": "nsa", "full": "dense", "streaming_llm": "window"}
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Cell:
    """One method, length and task; `identity` is everything that its numbers depend on."""

    method: Method
    length: int
    task: Task
    identity: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.method.name}: {self.task.name} at {self.length}"

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]


def compare(arguments: CompareArguments) -> Result:
    """Check, load, run what is not finished, print, write."""
    check(arguments)
    candidate = load(arguments.model, name=arguments.model.name, device=arguments.device, dtype=arguments.dtype)
    cells = list(cells_of(arguments, candidate))
    path = arguments.output / "rows.jsonl"
    finished = read_finished(path)
    todo = [cell for cell in cells if cell.key not in finished]
    console = Console(stderr=True)
    if len(todo) < len(cells):
        console.print(f"{len(cells) - len(todo)} of {len(cells)} cells are finished in {path}", highlight=False)
    try:
        for record in run_cells(todo, candidate, console):
            append(path, record)
            finished[record["key"]] = record
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; the same command goes on where it was ({path})") from None
    records = [finished[cell.key] for cell in cells]
    result, costs = gather(candidate, cells, records)
    result.save(arguments.output / "compare.json")
    title = f"Attention methods on {candidate.name}"
    lead = "The same weights, the same prompts, one budget of keys read per query."
    Report(result=result, title=title, lead=lead, costs=costs).save(arguments.output / "report.html")
    if arguments.json:
        print(json.dumps({**json.loads(result.to_json()), "costs": [asdict(cost) for cost in costs.rows]}, indent=1))
        return result
    out = Console()
    out.print(comparison_tables(result, costs))
    for note in result.notes:
        out.print(f"note: {note}", style="yellow")
    console.print(f"wrote {arguments.output / 'report.html'}", highlight=False)
    return result


def check(arguments: CompareArguments) -> None:
    """One clear line for what can be seen to be wrong before a model is loaded."""
    check_folder(arguments.model)
    unknown = [name for name in arguments.methods if name not in METHODS]
    if unknown:
        raise ValueError(f"unknown method {', '.join(unknown)}; expected some of {', '.join(METHODS)}")
    unknown = [name for name in arguments.tasks if name not in TASKS and not name.startswith(PREFIX)]
    if unknown or not arguments.tasks:
        expected = f"{', '.join(TASKS)}, {PREFIX}NAME"
        raise ValueError(f"unknown task {', '.join(unknown) or '(none)'}; expected some of {expected}")
    if not arguments.lengths or min(arguments.lengths) < 1:
        raise ValueError(f"lengths must be positive token counts, got {list(arguments.lengths)}")
    for repeated in (arguments.methods, arguments.tasks, arguments.lengths):
        if len(set(repeated)) < len(repeated):
            raise ValueError(f"named twice: {' '.join(map(str, repeated))}")


def methods_for(arguments: CompareArguments, candidate: Candidate) -> list[str]:
    """The methods asked for; else those that the model can run."""
    if arguments.methods:
        return list(arguments.methods)
    return [name for name, method in METHODS.items() if method.native == (candidate.attention == "nsa")]


def cells_of(arguments: CompareArguments, candidate: Candidate) -> Iterator[Cell]:
    """All cells, the short lengths first, so that early rows are there for every method."""
    fingerprint = fingerprint_of(arguments.model)
    text = text_of(arguments.text, [arguments.model])
    text_digest = hashlib.sha256(held_out_text(text).encode(errors="surrogatepass")).hexdigest()[:16]
    chat = {"auto": bool(getattr(candidate.tokenizer, "chat_template", None)), "yes": True, "no": False}[arguments.chat]
    for length in sorted(arguments.lengths):
        tasks = [task_of(name, arguments, length, text, chat) for name in arguments.tasks]
        for name in methods_for(arguments, candidate):
            method = METHODS[name].at_budget(split(length, arguments.budget))
            for task in tasks:
                identity = {
                    "model": fingerprint,
                    "method": method.name,
                    "sizes": asdict(method),
                    "length": length,
                    "task": task.name,
                    "parameters": asdict(task),  # type: ignore[call-overload]
                    "text": text_digest,  # Python sources are other ones after an installation
                    "dtype": arguments.dtype,
                    "device": torch.device(arguments.device).type,
                }
                yield Cell(method, length, task, json.loads(json.dumps(identity)))


def task_of(name: str, arguments: CompareArguments, length: int, text: str, chat: bool) -> Task:
    """A task with the command's parameters at one length."""
    shared: dict[str, Any] = {"samples": arguments.samples, "text": text}
    asked: dict[str, Any] = {**shared, "seed": arguments.seed, "chat": chat}
    if name.startswith(PREFIX):
        folder = str(arguments.lm_eval_path) if arguments.lm_eval_path else None
        return LMEval(task=name.removeprefix(PREFIX), samples=arguments.samples, path=folder)
    made: dict[str, Any] = {
        Needle.name: lambda: Needle(lengths=(length,), depths=arguments.depths, **asked),
        Recall.name: lambda: Recall(
            length=length, window_size=None, num_keys=arguments.keys, hops=arguments.hops, **asked
        ),
        MultiValue.name: lambda: MultiValue(length=length, num_values=arguments.values, **asked),
        Perplexity.name: lambda: Perplexity(length=length, **shared),
        Continuation.name: lambda: Continuation(length=length, decode=arguments.decode, **shared),
    }
    return made[name]()


def run_cells(cells: Sequence[Cell], candidate: Candidate, console: Console) -> Iterator[dict[str, Any]]:
    """Run cells one after another; a cell that does not fit into memory is a record that says so."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        overall = progress.add_task("cells", total=len(cells))
        prepared: dict[tuple[str, int], Method] = {}
        for cell in cells:
            bar = progress.add_task(cell.name, total=cell.task.num_steps(candidate.tokenizer))
            yield run_cell(cell, candidate, prepared, lambda steps, bar=bar: progress.advance(bar, steps))
            progress.remove_task(bar)
            progress.advance(overall)


def run_cell(cell: Cell, candidate: Candidate, prepared: dict[tuple[str, int], Method], advance: Any) -> dict[str, Any]:
    """The record of one cell: its rows, what was read, bytes and seconds; or that memory did not suffice."""
    record: dict[str, Any] = {"key": cell.key, **cell.identity, "status": "ok", "run": circumstances()}
    started = time.perf_counter()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        place = (cell.method.name, cell.length)
        if place not in prepared:
            prepared[place] = cell.method.prepare(candidate.model, sample(candidate, cell))
        phased = Phased(candidate.model, prepared[place])
        rows = cell.task.run(phased, candidate.tokenizer, advance)
        record["rows"] = [asdict(row) for row in rows]
        record["reads"] = phased.meter.summary()
        if prepared[place] != cell.method:
            record["prepared"] = asdict(prepared[place])
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        record["status"] = OUT_OF_MEMORY
        record["error"] = " ".join(str(error).split())[:200]
    if torch.cuda.is_available():
        record["peak_bytes"] = torch.cuda.max_memory_allocated()
        torch.cuda.empty_cache()
    record["seconds"] = time.perf_counter() - started
    return record


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA's and Python's have their own types; torch's allocator on the CPU raises a RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "can't allocate memory" in str(error) or "not enough memory" in str(error)


def sample(candidate: Candidate, cell: Cell) -> list[int]:
    """A text of the cell's length, for what a method does offline: the end of the held-out text."""
    source = getattr(cell.task, "text", "python")
    return list(encoder(candidate.tokenizer)(held_out_text(source)[-8 * cell.length :]))[-cell.length :]


def read_finished(path: Path) -> dict[str, dict[str, Any]]:
    """The records of a file by their keys; a line that was cut off by an interruption does not count."""
    records: dict[str, dict[str, Any]] = {}
    if not path.is_file():
        return records
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        records[record["key"]] = record
    return records


def append(path: Path, record: dict[str, Any]) -> None:
    """One more line, on the disk before the next cell begins; it never continues a line that was cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        cut_off = False
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            cut_off = file.read(1) != b"\n"
        file.write((b"\n" if cut_off else b"") + json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def gather(candidate: Candidate, cells: Sequence[Cell], records: Sequence[dict[str, Any]]) -> tuple[Result, Costs]:
    """Methods as the models of a result; cells without memory as rows without samples, and a note."""
    methods = list(dict.fromkeys(cell.method.name for cell in cells))
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
            rows[cell.method.name] += [Row.from_dict(row) for row in record["rows"]]
        else:
            notes.append(f"{cell.name} tokens: {record['status']}")
            nothing = {"value": float("nan"), "low": float("nan"), "high": float("nan"), "n": 0, "values": []}
            same = known.get((cell.length, cell.task.name), [])
            rows[cell.method.name] += [Row.from_dict({**row, **nothing, "correct": None}) for row in same]
        parameters = tasks.setdefault(cell.task.name, dict(cell.identity["parameters"]))
        lengths = sorted({c.length for c in cells})
        parameters.update({key: lengths for key in ("length", "lengths") if key in parameters})
    order = {name: place for place, name in enumerate(tasks)}
    for own in rows.values():
        own.sort(key=lambda row: order[row.task])  # stable: lengths stay in their order
    description = candidate.describe()
    models = [{**description, "name": name, "attention": TWIN_OF.get(name, name), "nsa": {}} for name in methods]
    notes.append(
        "perplexity is one prefill: methods that are sparse in decode alone are dense there; questions, answers and "
        "continuations are decode steps"
    )
    costs = Costs.of([Cost.of(cell.method, cell.length, record) for cell, record in zip(cells, records, strict=True)])
    run = {**circumstances(), "model": description["folder"]}
    return Result(models=models, tasks=tasks, rows=rows, run=run, notes=notes), costs


def fingerprint_of(folder: Path) -> str:
    """Tells models apart by their configuration, tokenizer, and the beginning and size of their weights."""
    digest = hashlib.sha256()
    for file in (folder / name for name in ("config.json", "tokenizer.json", "chat_template.jinja")):
        digest.update(file.read_bytes() if file.is_file() else b"-")
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as weights:
            digest.update(f"{file.name} {file.stat().st_size}".encode() + weights.read(1 << 20))
    return digest.hexdigest()[:16]
