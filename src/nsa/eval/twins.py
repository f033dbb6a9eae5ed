"""The demo's twins, trained and judged: one after the other, or several at once in processes of their own.

A small model keeps one core busy and gains little from a second, so on two cores two twins at once finish sooner, and
one that is trained is judged while the others train. What is finished is never trained again, and what was stopped
goes on from its last checkpoint.
"""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from nsa.eval.models import load
from nsa.eval.runner import evaluate
from nsa.eval.tasks import Row, Task
from nsa.eval.workers import CONTEXT
from nsa.training.config import TrainConfig
from nsa.training.metrics import MetricsFiles
from nsa.training.train import train
from nsa.training.trainer import last_checkpoint

POLL_SECONDS = 0.2


def train_and_judge(
    recipes: Mapping[str, TrainConfig], tasks: Sequence[Task], processes: int, console: Console
) -> dict[str, list[Row]]:
    """Train what is not trained yet and run the tasks on every twin, `processes` of them at once.

    Raises:
        ValueError, OSError: of the first twin that failed; the others are stopped and keep their checkpoints.
        KeyboardInterrupt: stopped; all keep their checkpoints.
    """
    for number, (twin, config) in enumerate(recipes.items(), start=1):
        console.print(f"[bold]{number}/{len(recipes)} {twin}[/bold]: {plan(config)}", highlight=False)
    if processes > 1:
        return _at_once(recipes, tasks, processes, console)
    for config in recipes.values():
        train_twin(config)
    return {twin: judge_twin(twin, config, tasks) for twin, config in recipes.items()}


def processes_for(twins: int) -> int:
    """As many at once as there are cores for this process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(twins, cores)


def plan(config: TrainConfig) -> str:
    """What `train_twin` is about to do."""
    if is_trained(config):
        return "trained already"
    last = last_checkpoint(config.out)
    return f"training {config.total_steps} steps" + (f", going on from {last.name}" if last else "")


def is_trained(config: TrainConfig) -> bool:
    return (config.out / "model.safetensors").exists()


def train_twin(config: TrainConfig) -> None:
    """Train, or go on training, what is not trained already."""
    if not is_trained(config):
        train(replace(config, resume=last_checkpoint(config.out) is not None))


def judge_twin(twin: str, config: TrainConfig, tasks: Sequence[Task], *, quiet: bool = False) -> list[Row]:
    """The rows of a trained twin."""
    return evaluate([load(config.out, name=twin)], tasks, console=Console(stderr=True, quiet=quiet)).rows[twin]


@dataclass
class _Running:
    process: BaseProcess
    result: Connection
    bar: TaskID


def _at_once(
    recipes: Mapping[str, TrainConfig], tasks: Sequence[Task], processes: int, console: Console
) -> dict[str, list[Row]]:
    threads = max(1, torch.get_num_threads() // processes)
    queue, running, rows = list(recipes), dict[str, _Running](), dict[str, list[Row]]()
    columns = (
        TextColumn("{task.description:<7}"), BarColumn(bar_width=None), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.fields[news]}"),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        try:
            while queue or running:
                while queue and len(running) < processes:
                    twin = queue.pop(0)
                    bar = progress.add_task(twin, total=recipes[twin].total_steps, news="")
                    running[twin] = _start(twin, recipes[twin], tasks, threads, bar)
                time.sleep(POLL_SECONDS)
                for twin, one in list(running.items()):
                    progress.update(one.bar, **_news(recipes[twin]))
                    if one.result.poll() or not one.process.is_alive():
                        rows[twin] = _rows_of(twin, one)
                        progress.stop_task(one.bar)
                        del running[twin]
        finally:
            for one in running.values():
                one.process.terminate()
            for one in running.values():
                one.process.join()
    return {twin: rows[twin] for twin in recipes}


def _start(twin: str, config: TrainConfig, tasks: Sequence[Task], threads: int, bar: TaskID) -> _Running:
    receive, send = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_in_process, args=(twin, config, tasks, threads, send), daemon=True)
    process.start()
    send.close()
    return _Running(process, receive, bar)


def _in_process(twin: str, config: TrainConfig, tasks: Sequence[Task], threads: int, result: Connection) -> None:
    # Ctrl-C reaches every process. The parent's alone counts; it stops all: a checkpoint is whole or not there.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        train_twin(replace(config, quiet=True))
        result.send(judge_twin(twin, config, tasks, quiet=True))
    except (ValueError, OSError) as error:
        result.send(error)


def _end_with_parent() -> None:
    """Nobody waits for a twin whose parent was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _rows_of(twin: str, one: _Running) -> list[Row]:
    """What a process that is through has sent: rows, or the error that ended it."""
    sent: list[Row] | Exception | None = None
    with suppress(EOFError):
        sent = one.result.recv()
    one.process.join()
    if isinstance(sent, Exception):
        raise sent
    if sent is None:
        raise OSError(f"the process of {twin} ended with exit code {one.process.exitcode}")
    return sent


def _news(config: TrainConfig) -> dict[str, Any]:
    """How far a twin is, from its metrics file; a line that is being written is left for the next look."""
    news: dict[str, Any] = {}
    losses: dict[str, float] = {}
    with suppress(FileNotFoundError):
        for line in MetricsFiles(config.out).jsonl.read_text(encoding="utf-8").splitlines():
            with suppress(json.JSONDecodeError):
                record = json.loads(line)
                news["completed"] = record["step"]
                losses |= {name: record[name] for name in ("loss", "eval_text_loss") if name in record}
    if is_trained(config):
        return {"completed": config.total_steps, "news": "trained, and judged on held-out packages and names"}
    if losses:
        shown = {"loss": "training loss", "eval_text_loss": "held-out text"}
        news["news"] = "  ".join(f"{shown[name]} {value:.3f}" for name, value in losses.items())
    return news
