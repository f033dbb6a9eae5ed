"""What a run tells: metrics.jsonl and metrics.csv in its folder, and a progress bar."""

import csv
import json
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from nsa.training.clock import Clock
from nsa.training.folder import METRICS_FILE

COLUMNS = (
    "step", "seconds", "learning_rate", "loss", "grad_norm", "eval_text_loss", "eval_retrieval_loss", "tokens",
    "tokens_per_second", "data_wait", "mfu",
)  # fmt: skip


class MetricsFiles(TrainerCallback):
    """One record a log line; a record of evaluation has eval_ fields. `seconds` leaves evaluation and saving out.

    `tokens_per_second`, `data_wait` (the share of the time in which a step waited for its batch) and `mfu` (the share
    of the GPU's peak, see nsa.costs.flops) are those since the record before.
    """

    def __init__(self, folder: Path, clock: Clock) -> None:
        self.jsonl, self.csv, self.clock = folder / METRICS_FILE, folder / "metrics.csv", clock

    def records(self) -> list[dict[str, Any]]:
        """What was recorded; a last line that was not written whole is left out.

        Raises:
            ValueError: a file that no run has written, in one line.
        """
        if not self.jsonl.exists():
            return []
        lines = self.jsonl.read_text(encoding="utf-8", errors="replace").splitlines()
        found = []
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                int(record["step"]), float(record["seconds"])
            except (ValueError, TypeError, KeyError) as error:
                if number == len(lines):
                    break
                raise ValueError(f"{self.jsonl}, line {number}: not a record of a run; move the file away") from error
            found.append(record)
        return found

    def forget_after(self, step: int) -> None:
        """Before a resumed run: drop what was recorded after its checkpoint."""
        kept = [record for record in self.records() if record["step"] <= step]
        self.jsonl.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        self.csv.unlink(missing_ok=True)
        for record in kept:
            self._write_csv(record)
        if kept:
            self.clock.seconds = kept[-1]["seconds"]
            self.clock.tokens = max(int(record.get("tokens", 0)) for record in kept)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == 0:
            self.jsonl.unlink(missing_ok=True)
            self.csv.unlink(missing_ok=True)
        self.clock.start()

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
        record = {"step": state.global_step, "seconds": round(self.clock.seconds, 3), **values}
        with self.jsonl.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self._write_csv(record)

    def _write_csv(self, record: dict[str, Any]) -> None:
        new = not self.csv.exists()
        with self.csv.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="", extrasaction="ignore")
            if new:
                writer.writeheader()
            writer.writerow(record)


SHOWN = {
    "loss": ("loss", "{:.3f}"),
    "eval_text_loss": ("text", "{:.3f}"),
    "eval_retrieval_loss": ("retrieval", "{:.3f}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
    "mfu": ("MFU", "{:.1%}"),
    "data_wait": ("waiting for data", "{:.0%}"),
}
WORTH_SAYING = 0.02  # a smaller share of waiting is no news


class Progress(TrainerCallback):
    """One bar for the run: how long it will take, the newest losses, tokens a second, and on a GPU its share used."""

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
        for key, value in (logs or {}).items():
            if key in SHOWN:
                name, form = SHOWN[key]
                self.shown[name] = form.format(float(value))
                if key == "data_wait" and value < WORTH_SAYING:
                    del self.shown[name]
        if self.bar is not None:
            self.bar.set_postfix(self.shown)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Also where the run ended by an error, whose line then stands alone."""
        if self.bar is not None:
            self.bar.close()
