"""transformers' Trainer, with checkpoints that appear whole or not at all."""

import os
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PrinterCallback, Trainer

from nsa.training.data import IGNORED, unwrap
from nsa.training.folder import checkpoints, last_checkpoint

PARTIAL = ".partial"  # what is being written, inside the run's folder


class WholeCheckpointTrainer(Trainer):
    """A checkpoint is written beside its place and moved there when every file is complete.

    An interruption, a full disk or a loss of power leaves the checkpoints before it as they were.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(data_collator=unwrap, **kwargs)
        self.remove_callback(PrinterCallback)
        self._parent: Path | None = None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The model's own loss, or, where the batch has `weights`, the weighted one."""
        weights = inputs.pop("weights", None)
        if weights is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = weighted_loss(outputs.logits, labels, weights, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._parent) if self._parent else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run = Path(self.args.output_dir)
        with _Partial(run) as self._parent:
            try:
                super()._save_checkpoint(model, trial)
                name = f"checkpoint-{self.state.global_step}"
                _replace(self._parent / name, run / name)
            finally:
                self._parent = None
        for old in checkpoints(run)[: -(self.args.save_total_limit or 10**9)]:
            shutil.rmtree(old, ignore_errors=True)

    def save_final(self, run: Path) -> None:
        """The model and its tokenizer in the run's own folder, for from_pretrained."""
        with _Partial(run) as part:
            self.save_model(str(part / "model"))
            for file in sorted((part / "model").iterdir()):
                os.replace(file, run / file.name)


def weighted_loss(logits: Tensor, labels: Tensor, weights: Tensor, count: Tensor | int | None = None) -> Tensor:
    """Mean over the labelled tokens (or sum / count) of weight * negative log-probability of the next token."""
    losses = cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / (count if count is not None else (labels[:, 1:] != IGNORED).sum())


class _Partial:
    """A fresh folder that does not outlive the block; an error on writing becomes one OSError."""

    def __init__(self, run: Path) -> None:
        self.folder = run / PARTIAL

    def __enter__(self) -> Path:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        return self.folder

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        if isinstance(error, Exception) and not isinstance(error, (AssertionError, TypeError)):
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            last = last_checkpoint(self.folder.parent)
            kept = f"{last} is whole" if last else "there is none before it"
            raise OSError(f"the checkpoint could not be written to {self.folder.parent} ({reason}); {kept}") from error


def _replace(source: Path, target: Path) -> None:
    if target.exists():
        shutil.rmtree(target)
    os.replace(source, target)
