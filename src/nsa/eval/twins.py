"""The demo's twins, trained and judged: one after the other, or several at once in processes of their own.

A small model keeps one core busy and gains little from a second, so on two cores two twins at once finish sooner, and
one that is trained is judged while the others train. What is finished is never trained again, and what was stopped
goes on from its last checkpoint.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from nsa.eval.files import read_records
from nsa.eval.workers import Worker, start_server
from nsa.training.config import TrainConfig
from nsa.training.folder import METRICS_FILE, is_trained, last_checkpoint

WORK = "nsa.eval.demo_work"
POLL_SECONDS = 0.2
Rows = list[dict[str, Any]]  # nsa.eval.tasks.Row as dictionaries: reading them needs no torch


def train_and_judge(recipes: Mapping[str, TrainConfig], processes: int, console: Console) -> dict[str, Rows]:
    """Train what is not trained yet and ask every twin the demo's questions, `processes` of them at once.

    Raises:
        ValueError, OSError: of the first twin that failed; the others are stopped and keep their checkpoints.
        KeyboardInterrupt: stopped; all keep their checkpoints.
    """
    for number, (twin, config) in enumerate(recipes.items(), start=1):
        console.print(Text.assemble((f"{number}/{len(recipes)} {twin}", "bold"), f": {plan(config)}"))
    if processes > 1:
        return _at_once(recipes, processes, console)
    from nsa.eval.demo_work import judge_twin, train_twin

    for config in recipes.values():
        train_twin(config)
    return {twin: judge_twin(twin, config) for twin, config in recipes.items()}


def processes_for(twins: int) -> int:
    """As many at once as there are cores for this process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(twins, cores)


def plan(config: TrainConfig) -> str:
    """What `train_and_judge` is about to do."""
    if is_trained(config.out):
        return "trained already"
    last = last_checkpoint(config.out)
    return f"training {config.total_steps} steps" + (f", going on from {last.name}" if last else "")


@dataclass
class _Running:
    worker: Worker
    bar: TaskID


def _at_once(recipes: Mapping[str, TrainConfig], processes: int, console: Console) -> dict[str, Rows]:
    start_server(WORK)
    queue, running, rows = list(recipes), dict[str, _Running](), dict[str, Rows]()
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
                    running[twin] = _Running(
                        Worker.start(twin, WORK, "finish_twin", twin, recipes[twin], processes), bar
                    )
                time.sleep(POLL_SECONDS)
                for twin, one in list(running.items()):
                    progress.update(one.bar, **_news(recipes[twin]))
                    if one.worker.is_done():
                        rows[twin] = one.worker.value()
                        progress.stop_task(one.bar)
                        del running[twin]
        finally:
            for one in running.values():
                one.worker.stop()
    return {twin: rows[twin] for twin in recipes}


def _news(config: TrainConfig) -> dict[str, Any]:
    """How far a twin is, from its metrics file; a line that is being written is left for the next look."""
    if is_trained(config.out):
        return {"completed": config.total_steps, "news": "trained; judged on names it has not seen"}
    news: dict[str, Any] = {}
    losses: dict[str, float] = {}
    for record in read_records(config.out / METRICS_FILE):
        news["completed"] = record["step"]
        losses |= {name: record[name] for name in ("loss", "eval_text_loss") if name in record}
    if losses:
        shown = {"loss": "training loss", "eval_text_loss": "held-out text"}
        news["news"] = "  ".join(f"{shown[name]} {value:.3f}" for name, value in losses.items())
    return news
