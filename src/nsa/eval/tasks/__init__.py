"""The tasks by name; a task is a file."""

from nsa.eval.tasks.needle import Needle
from nsa.eval.tasks.perplexity import Perplexity
from nsa.eval.tasks.recall import Recall
from nsa.eval.tasks.task import Row, Task

TASKS: dict[str, type[Needle] | type[Recall] | type[Perplexity]] = {
    task.name: task for task in (Needle, Recall, Perplexity)
}

__all__ = ["TASKS", "Needle", "Perplexity", "Recall", "Row", "Task"]
