"""Run the cells of a comparison, one after another or in processes of their own; each gives a record."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from nsa.eval.compare_cells import Cell
from nsa.eval.compared import Compared, load_folder
from nsa.eval.methods import METHODS, Method
from nsa.eval.methods.phased import Phased
from nsa.eval.models import Candidate
from nsa.eval.runner import circumstances
from nsa.eval.tasks.task import Advance, ignore
from nsa.eval.text import held_out_text
from nsa.out_of_memory import is_out_of_memory
from nsa.training.tokenizer import encoder

if TYPE_CHECKING:
    from nsa.eval.arguments import CompareArguments

OUT_OF_MEMORY = "out of memory"
COLUMNS = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
Prepared = dict[str, Method]  # by Cell.preparation: methods after what they do offline


def run_here(
    cells: Sequence[Cell], compared: Compared, prepared: Prepared, console: Console
) -> Generator[dict[str, Any]]:
    """Records of the cells, one after another."""
    with Progress(*COLUMNS, console=console, transient=True) as progress:
        overall = progress.add_task("cells", total=len(cells))
        for cell in cells:
            candidate = compared.of(cell.folder)
            bar = progress.add_task(cell.name, total=cell.task.num_steps(candidate.tokenizer))
            record = run_cell(cell, candidate, prepared.get(cell.preparation), partial(progress.advance, bar))
            remember(prepared, cell, record)
            yield record
            progress.remove_task(bar)
            progress.advance(overall)


def run_apart(
    cells: Sequence[Cell], arguments: CompareArguments, prepared: Prepared, console: Console
) -> Generator[dict[str, Any]]:
    """Records of the cells as they are finished by `arguments.processes` processes, the longest texts first.

    Each process loads the models that its cells are of, and has its share of torch's threads. Cells whose method
    prepares itself offline wait for the first of them.

    Raises:
        ValueError: if a process dies, as one does that the system kills for its memory.
    """
    threads = max(1, torch.get_num_threads() // arguments.processes)
    pool = ProcessPoolExecutor(arguments.processes, _context(), initializer=_begin, initargs=(arguments, threads))
    waiting: dict[str, list[Cell]] = {}
    running: dict[Future[dict[str, Any]], Cell] = {}

    def start(cell: Cell) -> None:
        running[pool.submit(_run, cell, prepared.get(cell.preparation))] = cell

    try:
        with Progress(*COLUMNS, console=console, transient=True) as progress:
            overall = progress.add_task(f"cells, {arguments.processes} at once", total=len(cells))
            for cell in sorted(cells, key=lambda cell: -cell.length):
                if cell.preparation in waiting:
                    waiting[cell.preparation].append(cell)
                    continue
                if prepares(cell.method) and cell.preparation not in prepared:
                    waiting[cell.preparation] = []
                start(cell)
            while running:
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    cell, record = running.pop(done), done.result()
                    remember(prepared, cell, record)
                    for other in waiting.pop(cell.preparation, ()):
                        start(other)
                    yield record
                    progress.advance(overall)
        pool.shutdown()
    except BrokenProcessPool:
        raise ValueError("a process ended by itself: too little memory for so many --processes?") from None
    finally:
        for process in multiprocessing.active_children():  # none is left after a shutdown
            process.terminate()


def run_cell(
    cell: Cell, candidate: Candidate, method: Method | None = None, advance: Advance = ignore
) -> dict[str, Any]:
    """The record of one cell: its rows, what was read, bytes and seconds; or that memory did not suffice.

    `method` is the cell's, if it has been prepared already.
    """
    record: dict[str, Any] = {"key": cell.key, **cell.identity, "status": "ok", "run": circumstances()}
    started = time.perf_counter()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        if method is None:
            method = cell.method
            if prepares(method):
                method = method.prepare(candidate.model, sample(candidate, cell))
        phased = Phased(candidate.model, method)
        rows = cell.task.run(phased, candidate.tokenizer, advance)
        record["rows"] = [asdict(row) for row in rows]
        record["reads"] = phased.meter.summary()
        if method != cell.method:
            record["prepared"] = asdict(method)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        record["status"] = OUT_OF_MEMORY
        record["error"] = " ".join(str(error).split())[:200]
    if torch.cuda.is_available():
        record["peak_bytes"] = torch.cuda.max_memory_allocated()
        torch.cuda.empty_cache()
    record["seconds"] = time.perf_counter() - started
    return record


def prepares(method: Method) -> bool:
    """Does the method do something offline?"""
    return type(method).prepare is not Method.prepare


def remember(prepared: Prepared, cell: Cell, record: dict[str, Any]) -> None:
    """What a record says of the method after its preparation, for the cells that share it."""
    if "prepared" in record:
        fields = {name: _tuples(value) for name, value in record["prepared"].items()}
        prepared[cell.preparation] = METHODS[cell.method.name](**fields)


def sample(candidate: Candidate, cell: Cell) -> list[int]:
    """A text of the cell's length, for what a method does offline: the end of the held-out text."""
    source = getattr(cell.task, "text", "python")
    return list(encoder(candidate.tokenizer)(held_out_text(source)[-8 * cell.length :]))[-cell.length :]


def _context() -> Any:
    """How processes begin: with nothing of this one, whose CUDA they could not use, but with what all must import."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nsa.eval.compare_run", "nsa.models"])
    return context


_of_this_process: dict[str, Any] = {}


def _begin(arguments: CompareArguments, threads: int) -> None:
    """The beginning of a process that runs cells."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    torch.set_num_threads(threads)
    _of_this_process.update(arguments=arguments, models={arguments.model: load_folder(arguments, arguments.model)})


def _run(cell: Cell, method: Method | None) -> dict[str, Any]:
    arguments, models = _of_this_process["arguments"], _of_this_process["models"]
    if cell.folder not in models:
        tokenizer = models[arguments.model].tokenizer
        models[cell.folder] = replace(load_folder(arguments, cell.folder), tokenizer=tokenizer)
    return run_cell(cell, models[cell.folder], method)


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    return tuple(_tuples(part) for part in value) if isinstance(value, list | tuple) else value
