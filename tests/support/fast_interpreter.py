"""Triton's interpreter without what makes it slow; imported before kernels run, in a process of its own.

At every call of a function inside a kernel it puts its own operations in the place of the language's again, which takes
longer than most such functions. Here it does so once a launch for every module that has such functions.
"""

from collections.abc import Callable
from typing import Any

import pytest
from triton.runtime import interpreter

from nsa.kernels import selection

_patch, _launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
_patched: set[int] = set()


class _Nothing:
    def restore(self) -> None:
        """What was not patched again."""


def _patch_once(function: Callable[..., Any]) -> Any:
    if id(function.__globals__) in _patched:
        return _Nothing()
    _patched.add(id(function.__globals__))
    return _patch(function)


def _launch_anew(executor: Any, *args: Any, **kwargs: Any) -> None:
    _patched.clear()
    _launch(executor, *args, **kwargs)


interpreter._patch_lang, interpreter.GridExecutor.__call__ = _patch_once, _launch_anew


def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program takes as long whatever its size: the best blocks of all queries of a tile in one, not of two."""
    monkeypatch.setattr(selection, "TOP_QUERIES", 64)
