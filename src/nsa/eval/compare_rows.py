"""rows.jsonl: one line a finished cell."""

import json
import os
from pathlib import Path
from typing import Any


def read_finished(path: Path) -> dict[str, dict[str, Any]]:
    """The records of a file by their keys; a line that was cut off by an interruption does not count."""
    records: dict[str, dict[str, Any]] = {}
    if not path.is_file():
        return records
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        records[record["key"]] = record
    return records


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
