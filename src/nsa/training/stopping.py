"""How a run ends before its last step: by Ctrl-C, after a checkpoint; or because its numbers are no numbers."""

import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class StopOnCtrlC(TrainerCallback):
    """The first Ctrl-C ends the run after a checkpoint of the step at hand; a second one ends it at once.

    A context manager: outside of it Ctrl-C does what it did before. In a thread that is not the main one, where no
    signal arrives, it does nothing. Of several processes all stop at the same step, and a second signal, which torchrun
    sends after the terminal's, changes nothing.
    """

    def __init__(self, *, quiet: bool = False, any_rank: Callable[[bool], bool] | None = None) -> None:
        """any_rank: whether a flag is true in one of several processes."""
        self.asked, self.any_rank = False, any_rank
        self._quiet, self._process = quiet, os.getpid()
        self._before: Any = None

    def __enter__(self) -> "StopOnCtrlC":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _ask(self, *_: object) -> None:
        if os.getpid() != self._process:  # a process that makes batches: the run itself ends it
            return
        if self.asked and self.any_rank is None:
            raise KeyboardInterrupt
        self.asked = True
        if not self._quiet:
            print("\nstopping: a checkpoint first (Ctrl-C again: at once, without)", file=sys.stderr, flush=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.any_rank is not None:
            self.asked = self.any_rank(self.asked)
        if self.asked:
            control.should_log = control.should_save = control.should_training_stop = True
            control.should_evaluate = False


def non_finite(logs: Mapping[str, Any]) -> str | None:
    """The first loss, or norm of the gradient, that is no number, as "loss is nan"; None where all are.

    A gradient's norm may overflow to infinity: its step is then left out by clipping.
    """
    for name, value in logs.items():
        if name == "grad_norm" and math.isinf(value):
            continue
        if (name == "grad_norm" or name.endswith("loss")) and not math.isfinite(value):
            return f"{name} is {value}"
    return None


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no element is NaN or infinite; waits for the device once."""
    flags = [tensor.isfinite().all() for tensor in tensors if tensor.is_floating_point()]
    return not flags or bool(torch.stack([flag.to(flags[0].device) for flag in flags]).all())
