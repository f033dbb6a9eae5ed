"""What lies in the folder of a training run; looking at it needs neither torch nor transformers."""

from pathlib import Path

METRICS_FILE = "metrics.jsonl"
MODEL_FILE = "model.safetensors"


def is_trained(run: Path) -> bool:
    """Whether the run came to its end."""
    return (run / MODEL_FILE).exists()


def checkpoints(run: Path) -> list[Path]:
    """The run's whole checkpoints, oldest first."""
    if not run.is_dir():
        return []
    found = [path for path in run.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def last_checkpoint(run: Path) -> Path | None:
    found = checkpoints(run)
    return found[-1] if found else None
