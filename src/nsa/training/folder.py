"""What lies in the folder of a training run; looking at it needs neither torch nor transformers."""

import json
import os
from pathlib import Path

CONFIG_FILE = "train_config.json"
METRICS_FILE = "metrics.jsonl"
MODEL_FILE = "model.safetensors"
STATE_FILE = "trainer_state.json"
DATA_FILE = "data.json"  # digests of the data and the tokenizer
# Without one of them a continued run would silently be another one.
CHECKPOINT_FILES = (MODEL_FILE, "optimizer.pt", "scheduler.pt", "rng_state.pth", STATE_FILE)
SHARDS = "shards"  # model and optimizer in a checkpoint of several processes, in pieces ..
SHARDED_FILES = (f"{SHARDS}/.metadata", "scheduler.pt", STATE_FILE)  # .. and what it holds


def at_home(path: str | Path) -> Path:
    """With ~ and ~user expanded; an unknown user's stays as it is."""
    return Path(os.path.expanduser(path))


def is_trained(run: Path) -> bool:
    """Whether the run came to its end."""
    return (run / MODEL_FILE).exists()


def checkpoints(run: Path) -> list[Path]:
    """The run's whole checkpoints, oldest first."""
    if not run.is_dir():
        return []
    found = [path for path in run.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=step_of)


def last_checkpoint(run: Path) -> Path | None:
    found = checkpoints(run)
    return found[-1] if found else None


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def is_sharded(checkpoint: Path) -> bool:
    """Whether several processes have written it, each its pieces."""
    return (checkpoint / SHARDS).is_dir()


def check_free(run: Path) -> None:
    """ValueError in one line if a new run in this folder would meet another one, or files that no run has written."""
    if last_checkpoint(run) is not None or is_trained(run):
        raise ValueError(f"{run} holds a run already; continue it with --resume or choose another --out")
    if not run.is_dir() or (run / CONFIG_FILE).exists():  # the latter: a run that came to no checkpoint
        return
    others = sorted(path.name for path in run.iterdir() if not path.name.startswith("."))
    if others:
        shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        raise ValueError(f"{run} holds files that are not a run's ({shown}); choose an empty or a new folder as --out")


def check_checkpoint(checkpoint: Path) -> None:
    """ValueError in one line if a run could not continue from here exactly as it was."""
    hint = f"remove {checkpoint.name} to continue from one before it, if there is one"
    files = SHARDED_FILES if is_sharded(checkpoint) else CHECKPOINT_FILES
    missing = [name for name in files if not (checkpoint / name).is_file()]
    if missing:
        raise ValueError(f"--resume: {checkpoint} lacks {', '.join(missing)}; {hint}")
    try:
        step = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))["global_step"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"--resume: {checkpoint / STATE_FILE} is damaged; {hint}") from error
    if step != step_of(checkpoint):
        raise ValueError(f"--resume: {checkpoint} is the checkpoint of step {step}; {hint}")
