"""The tasks by name; a task is a file."""

from typing import Any

from nsa.eval.tasks.common_words import CommonWords
from nsa.eval.tasks.continuation import Continuation
from nsa.eval.tasks.frequent_words import FrequentWords
from nsa.eval.tasks.mqar import MQAR
from nsa.eval.tasks.multi_key import MultiKey
from nsa.eval.tasks.multi_query import MultiQuery
from nsa.eval.tasks.multi_value import MultiValue
from nsa.eval.tasks.needle import Needle
from nsa.eval.tasks.noise import Noise
from nsa.eval.tasks.perplexity import Perplexity
from nsa.eval.tasks.puzzles import PuzzleTask
from nsa.eval.tasks.recall import Recall
from nsa.eval.tasks.task import Row, Task
from nsa.eval.tasks.tracking import Tracking

# Those of puzzles take the same parameters, beside their own.
PUZZLES: dict[str, type[PuzzleTask]] = {
    task.name: task for task in (Noise, MultiKey, MultiQuery, Tracking, CommonWords, FrequentWords, MQAR)
}
TASKS: dict[str, Any] = {
    **{task.name: task for task in (Needle, Recall, Perplexity, MultiValue, Continuation)},
    **PUZZLES,
}

__all__ = ["PUZZLES", "TASKS", "Continuation", "MultiValue", "Needle", "Perplexity", "Recall", "Row", "Task"]
