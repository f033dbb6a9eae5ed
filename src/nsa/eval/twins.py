"""Training the demo's twins: one after the other, or several at once in processes of their own.

A small model keeps one core busy and gains little from a second, so on two cores two twins at once finish sooner.
What is finished is never trained again, and what was stopped goes on from its last checkpoint.
"""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from nsa.training.config import TrainConfig
from nsa.training.metrics import MetricsFiles
from nsa.training.train import train
from nsa.training.trainer import last_checkpoint

POLL_SECONDS = 0.2


def train_twins(recipes: Mapping[str, TrainConfig], processes: int, console: Console) -> None:
    """Train what is not trained yet, `processes` twins at once.

    Raises:
        ValueError, OSError: of the first twin that failed; the others are stopped and keep their checkpoints.
        KeyboardInterrupt: stopped; all keep their checkpoints.
    """
    for number, (twin, config) in enumerate(recipes.items(), start=1):
        console.print(f"[bold]{number}/{len(recipes)} {twin}[/bold]: {plan(config)}", highlight=False)
    waiting = {twin: config for twin, config in recipes.items() if not is_trained(config)}
    if processes > 1 and len(waiting) > 1:
        _train_at_once(waiting, processes, console)
    else:
        for config in waiting.values():
            train_twin(config)


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
    """Train, or go on training."""
    train(replace(config, resume=last_checkpoint(config.out) is not None))


@dataclass
class _Running:
    process: BaseProcess
    result: Connection
    bar: TaskID


def _train_at_once(waiting: dict[str, TrainConfig], processes: int, console: Console) -> None:
    threads = max(1, torch.get_num_threads() // processes)
    queue, running = list(waiting), dict[str, _Running]()
    columns = (
        TextColumn("{task.description:<7}"), BarColumn(bar_width=None), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.fields[losses]}"),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        try:
            while queue or running:
                while queue and len(running) < processes:
                    twin = queue.pop(0)
                    bar = progress.add_task(twin, total=waiting[twin].total_steps, losses="")
                    running[twin] = _start(waiting[twin], threads, bar)
                time.sleep(POLL_SECONDS)
                for twin, one in list(running.items()):
                    progress.update(one.bar, **_news(waiting[twin]))
                    if not one.process.is_alive():
                        del running[twin]
                        _raise_if_failed(twin, one)
        finally:
            for one in running.values():
                one.process.terminate()
            for one in running.values():
                one.process.join()


def _start(config: TrainConfig, threads: int, bar: TaskID) -> _Running:
    """A process of its own. Ctrl-C reaches this one alone, which then stops all: a checkpoint is whole or not there."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_train_in_process, args=(config, threads, send), daemon=True)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited by what is started now
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, before)
    send.close()
    return _Running(process, receive, bar)


def _train_in_process(config: TrainConfig, threads: int, result: Connection) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        train_twin(replace(config, quiet=True))
    except (ValueError, OSError) as error:
        result.send(error)


def _end_with_parent() -> None:
    """Nobody waits for a twin whose parent was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _raise_if_failed(twin: str, one: _Running) -> None:
    if one.result.poll():
        with suppress(EOFError):
            raise one.result.recv()
    if one.process.exitcode:
        raise OSError(f"the training of {twin} ended with exit code {one.process.exitcode}")


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
    if losses:
        shown = {"loss": "training loss", "eval_text_loss": "held-out text"}
        news["losses"] = "  ".join(f"{shown[name]} {value:.3f}" for name, value in losses.items())
    return news
