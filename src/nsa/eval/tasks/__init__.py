"""The tasks by name; a task is a file."""

from typing import Any

from nsa.eval.tasks.continuation import Continuation
from nsa.eval.tasks.multi_value import MultiValue
from nsa.eval.tasks.needle import Needle
from nsa.eval.tasks.perplexity import Perplexity
from nsa.eval.tasks.recall import Recall
from nsa.eval.tasks.task import Row, Task

TASKS: dict[str, Any] = {task.name: task for task in (Needle, Recall, Perplexity, MultiValue, Continuation)}

__all__ = ["TASKS", "Continuation", "MultiValue", "Needle", "Perplexity", "Recall", "Row", "Task"]
