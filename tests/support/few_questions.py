"""The demo's work with few questions, for its processes too, which see no patch of a test."""

from typing import Any

from nsa.eval import demo_work
from nsa.eval.tasks import Needle, Perplexity, Recall, Task
from nsa.training.config import TrainConfig


def few(config: TrainConfig) -> list[Task]:
    sizes: dict[str, Any] = {"length": 128, "text": config.data}
    recall = Recall(**sizes, window_size=24, num_layers=2, num_keys=2, hops=(1,), samples=2, seed=config.seed)
    needle = Needle(lengths=(64,), depths=(0.5,), samples=1, text=config.data)
    return [recall, Perplexity(**sizes, samples=2), needle]


def finish_twin(twin: str, config: TrainConfig, processes: int) -> list[dict[str, Any]]:
    """In a process of its own."""
    demo_work.tasks_for = few
    return demo_work.finish_twin(twin, config, processes)
