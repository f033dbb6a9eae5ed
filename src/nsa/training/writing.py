"""Checkpoints that appear whole or not at all, and readers of them that say in one line what is wrong."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from nsa.training.folder import last_checkpoint
from nsa.training.tokenizer import first_line

PARTIAL = ".partial"  # what is being written, inside the run's folder


class Partial:
    """A fresh folder that does not outlive the block; an error on writing becomes one OSError."""

    def __init__(self, run: Path) -> None:
        self.folder = run / PARTIAL

    def __enter__(self) -> Path:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        return self.folder

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        if isinstance(error, Exception):
            self.tell(error)

    def tell(self, error: Exception) -> None:
        """Raise that one OSError; an error of this library's own stays what it is."""
        if isinstance(error, (AssertionError, TypeError)):
            return
        last = last_checkpoint(self.folder.parent)
        kept = f"{last} is whole" if last else "there is none before it"
        raise OSError(
            f"the checkpoint could not be written to {self.folder.parent} ({first_line(error)}); {kept}"
        ) from error


@contextmanager
def in_pieces() -> Iterator[None]:
    """torch.distributed.checkpoint raises what is no Exception, on all ranks: here the first failed rank's error."""
    try:
        yield
    except CheckpointException as failed:
        error, _ = next(iter(failed.failures.values()))
        raise OSError(first_line(error)) from failed


@contextmanager
def reading(checkpoint: str | None) -> Iterator[None]:
    """Whatever a damaged file makes its reader raise becomes one line."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"--resume: {checkpoint} cannot be read ({first_line(error)}); remove it to continue from one before it"
        ) from error


def put_in_place(source: Path, target: Path) -> None:
    if target.exists():
        shutil.rmtree(target)
    os.replace(source, target)
