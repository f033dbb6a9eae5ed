"""Calls in processes of their own: what they return, what they raise, and what is said of one that died."""

import pytest

from nsa.eval.workers import Worker


def test_a_call_returns_its_value():
    assert Worker.start("a sum", "operator", "add", 2, 3).value() == 5


def test_an_error_that_a_user_can_repair_is_raised_here():
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Worker.start("a listing", "os", "listdir", "/nowhere").value()


def test_a_process_that_died_is_named():
    with pytest.raises(OSError, match=r"^the process of dense ended with exit code 3 before its work was done$"):
        Worker.start("dense", "os", "_exit", 3).value()
