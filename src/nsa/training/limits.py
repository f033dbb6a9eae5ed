"""Numbers that a command takes: finite and not negative, unless its table of limits says otherwise."""

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

ANY = (-math.inf, math.inf)  # limits of a number that may be negative, though not infinite
Limits = tuple[float, float]


def check_numbers(config: Any, limits: Mapping[str, Limits]) -> None:
    """ValueError in one line for the first number of a dataclass that no run can have.

    Args:
        config: every int and float among its fields is looked at, whatever the limits name.
        limits: least and greatest value of a field; (0, infinity) for one that is not there. NaN and infinity are
            never taken.
    """
    for field in fields(config):
        value = getattr(config, field.name)
        kind = {"int": int, "float": float}.get(str(field.type), field.type)
        if kind in (int, float) and not _is_a(value, kind):
            expected = "a whole number" if kind is int else "a number"
            raise ValueError(f"{field.name} should be {expected}, got {value!r}")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        least, greatest = limits.get(field.name, (0, math.inf))
        if not math.isfinite(value):
            raise ValueError(f"{field.name} should be a finite number, got {value}")
        if not least <= value <= greatest:
            between = f"at least {least:g}" if greatest == math.inf else f"between {least:g} and {greatest:g}"
            raise ValueError(f"{field.name} should be {between}, got {value}")


def _is_a(value: object, kind: type) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, int) or (kind is float and isinstance(value, float))
