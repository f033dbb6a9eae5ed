"""rows.jsonl: one line a finished cell."""

import json
import os
from pathlib import Path
from typing import Any

from nsa.eval.files import read_records
from nsa.eval.methods.method import PHASES
from nsa.eval.tasks.task import Row


def read_finished(path: Path) -> dict[str, dict[str, Any]]:
    """The whole records of a file by their keys; what was cut off or written by others does not count."""
    return {record["key"]: record for record in read_records(path) if _is_whole(record)}


def _is_whole(record: dict[str, Any]) -> bool:
    """Whether a cell need not be run again."""
    if not isinstance(record.get("key"), str) or not isinstance(record.get("status"), str):
        return False
    try:
        if record["status"] == "ok":
            rows = [Row.from_dict(row) for row in record["rows"]]
            reads = [record["reads"]["cache_bytes"], *(record["reads"][phase]["seconds"] for phase in PHASES)]
            numbers = [number for row in rows for number in (row.value, row.low, row.high, row.n, *row.values)]
            return all(isinstance(number, float | int) for number in (*reads, *numbers))
    except (KeyError, TypeError, ValueError):
        return False
    return True


def append(path: Path, record: dict[str, Any]) -> None:
    """One more line, on the disk before the next cell begins; it never continues a line that was cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        cut_off = False
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            cut_off = file.read(1) != b"\n"
        file.write((b"\n" if cut_off else b"") + json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
