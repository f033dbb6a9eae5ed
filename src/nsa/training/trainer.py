"""transformers' Trainer, with checkpoints that appear whole or not at all and hold nothing but numbers."""

import os
import random
import shutil
import signal
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer

from nsa.training.clock import Clock
from nsa.training.compiling import begin_step, own_gradients
from nsa.training.data import unwrap
from nsa.training.folder import MODEL_FILE, checkpoints, last_checkpoint
from nsa.training.stopping import all_finite, non_finite
from nsa.training.writing import Partial, put_in_place, reading

PREFETCHED = 4  # batches that each worker makes ahead


class WholeCheckpointTrainer(Trainer):
    """A checkpoint is written beside its place and moved there when every file is complete.

    An interruption, a full disk or a loss of power leaves the checkpoints before it as they were, and so does a model
    that has become NaN: it is not saved, and training stops.
    """

    def __init__(
        self,
        *,
        clock: Clock | None = None,
        flops_of_token: Callable[[int], float] | None = None,
        workers: int = 0,
        in_cuda_graphs: bool = False,
        ranks_with_tokens: int = 1,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            clock: is told of every step.
            flops_of_token: number of the optimizer's step, from 0 -> floating-point operations for a token of it.
            workers: processes that make training batches ahead.
            in_cuda_graphs: whether the model's passes are recorded in CUDA graphs.
            ranks_with_tokens: processes that have as many tokens as this one, of which each is another.
            kwargs: Trainer's.
        """
        super().__init__(data_collator=unwrap, **kwargs)
        self.remove_callback(PrinterCallback)
        self.clock, self.workers, self.in_cuda_graphs = clock or Clock(), workers, in_cuda_graphs
        self._flops_of_token = flops_of_token or (lambda step: 0.0)
        self._parent: Path | None = None
        self._ranks_with_tokens = ranks_with_tokens
        self._pass = 0  # of this process, in the whole run

    # Data

    def get_train_dataloader(self) -> DataLoader:
        """Batches in the order of their numbers, on a GPU made ahead by workers, into pinned memory."""
        loader: DataLoader = DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            collate_fn=unwrap,
            num_workers=self.workers,
            pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=PREFETCHED if self.workers else None,
            worker_init_fn=leave_ctrl_c_to_the_run,
        )
        return self._prepared(loader)

    def _prepared(self, loader: DataLoader) -> DataLoader:
        return self.accelerator.prepare(loader)

    def get_batch_samples(self, *args: Any) -> Any:
        with self.clock.waiting():
            samples, count = super().get_batch_samples(*args)
        self._pass = self.state.global_step * self.args.gradient_accumulation_steps
        tokens = sum(item["input_ids"].numel() for item in samples) * self._ranks_with_tokens
        self.clock.count(tokens, tokens * self._flops_of_token(self.state.global_step))
        return samples, count

    # Passes

    def number_in_run(self, number: int) -> int:
        """Of a pass among those of all processes, of one among this process's."""
        return number

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        # What is drawn at random follows, as batches do, from the number of the pass, whoever takes it.
        torch.manual_seed(random.Random(f"{self.args.seed}/{self.number_in_run(self._pass)}").getrandbits(32))
        self._pass += 1
        if not self.in_cuda_graphs:
            return super().training_step(model, *args, **kwargs)
        is_first = all(parameter.grad is None for parameter in model.parameters())
        begin_step()
        loss = super().training_step(model, *args, **kwargs)
        if is_first and not self.accelerator.sync_gradients:  # another pass adds to them
            own_gradients(model)
        return loss

    # Losses

    def autocast_smart_context_manager(self, *args: Any, **kwargs: Any) -> Any:
        """Around all of a loss. accelerate's is around the model's own forward, which not every loss calls."""
        return torch.autocast(self.args.device.type, torch.bfloat16) if self.args.bf16 else nullcontext()

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # nsa.costs.flops counts; this one looks at every parameter in every step

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self.clock.lap() | {"tokens": self.clock.tokens}
        if (what := non_finite(logs)) is not None:
            raise ValueError(self._diverged(what))
        super().log(logs, start_time)

    def _diverged(self, what: str) -> str:
        last = last_checkpoint(Path(self.args.output_dir))
        kept = f"the last good checkpoint is {last}" if last else "no checkpoint was written before"
        return f"{what} at step {self.state.global_step}: training has diverged and was stopped; {kept}"

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self.clock.paused(), torch.compiler.set_stance("force_eager"):  # few passes, not worth graphs of their own
            return super()._evaluate(*args, **kwargs)

    # Checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._parent) if self._parent else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run = Path(self.args.output_dir)
        with self.clock.paused():
            self._require_numbers()
            with Partial(run) as self._parent:
                try:
                    super()._save_checkpoint(model, trial)
                    name = f"checkpoint-{self.state.global_step}"
                    put_in_place(self._parent / name, run / name)
                finally:
                    self._parent = None
            for old in checkpoints(run)[: -(self.args.save_total_limit or 10**9)]:
                shutil.rmtree(old, ignore_errors=True)

    def save_final(self, run: Path) -> None:
        """The model and its tokenizer in the run's own folder, for from_pretrained."""
        self._require_numbers()
        with Partial(run) as part:
            self.save_model(str(part / "model"))
            for file in sorted((part / "model").iterdir(), key=lambda file: file.name == MODEL_FILE):
                os.replace(file, run / file.name)  # the weights last: with them the run counts as finished

    def _require_numbers(self) -> None:
        """ValueError if what is about to be saved is NaN or infinite: losses, weights, or the optimizer's state."""
        assert self.model is not None
        states = () if self.optimizer is None else self.optimizer.state.values()
        moments = (value for state in states for value in state.values() if isinstance(value, Tensor))
        for name, tensors in (
            ("the loss", [self._tr_loss]),
            ("a weight", self.model.parameters()),
            ("the optimizer's state", moments),
        ):
            if not self._all_finite(tensors):
                raise ValueError(self._diverged(f"{name} is NaN or infinite"))

    def _all_finite(self, tensors: Iterable[Tensor]) -> bool:
        return all_finite(tensors)

    # Continuing

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with reading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(checkpoint):
            super()._load_rng_state(checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Trainer warns of weights that a checkpoint lacks, and goes on with random ones."""
        assert self.model is not None
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or ())
        missing = sorted(set(load_result.missing_keys) - tied)
        if missing or load_result.unexpected_keys:
            raise ValueError(f"its weights are not this model's: {[*missing, *load_result.unexpected_keys][:3]}")
        self.model.tie_weights()


def leave_ctrl_c_to_the_run(worker: int) -> None:
    """A terminal sends it to every process; a worker that it ends takes the run with it. And threads stay behind."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
