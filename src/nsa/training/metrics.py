"""What a run tells: metrics.jsonl and metrics.csv in its folder, and a progress bar."""

import csv
import json
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from nsa.training.folder import METRICS_FILE

COLUMNS = ("step", "seconds", "learning_rate", "loss", "grad_norm", "eval_text_loss", "eval_retrieval_loss")


class MetricsFiles(TrainerCallback):
    """One record a log line; a record of evaluation has eval_ fields. `seconds` leaves evaluation and saving out."""

    def __init__(self, folder: Path) -> None:
        self.jsonl, self.csv = folder / METRICS_FILE, folder / "metrics.csv"
        self.seconds = 0.0
        self._began = 0.0

    def records(self) -> list[dict[str, Any]]:
        if not self.jsonl.exists():
            return []
        return [json.loads(line) for line in self.jsonl.read_text().splitlines()]

    def forget_after(self, step: int) -> None:
        """Before a resumed run: drop what was recorded after its checkpoint."""
        kept = [record for record in self.records() if record["step"] <= step]
        self.jsonl.write_text("".join(json.dumps(record) + "\n" for record in kept))
        self.csv.unlink(missing_ok=True)
        for record in kept:
            self._write_csv(record)
        if kept:
            self.seconds = kept[-1]["seconds"]

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == 0:
            self.jsonl.unlink(missing_ok=True)
            self.csv.unlink(missing_ok=True)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.seconds += time.perf_counter() - self._began

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        logs = logs or {}
        if "train_runtime" in logs:
            return
        values = {key: float(value) for key, value in logs.items() if key in COLUMNS}
        record = {"step": state.global_step, "seconds": round(self.seconds, 3), **values}
        with self.jsonl.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self._write_csv(record)

    def _write_csv(self, record: dict[str, Any]) -> None:
        new = not self.csv.exists()
        with self.csv.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="")
            if new:
                writer.writeheader()
            writer.writerow(record)


class Progress(TrainerCallback):
    """One bar for the run, with the newest losses."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None
        self.shown: dict[str, str] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        assert self.bar is not None
        self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        names = {"loss": "loss", "eval_text_loss": "text", "eval_retrieval_loss": "retrieval"}
        self.shown |= {names[key]: f"{float(value):.3f}" for key, value in (logs or {}).items() if key in names}
        if self.bar is not None:
            self.bar.set_postfix(self.shown)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()
