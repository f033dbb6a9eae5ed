"""Files that others may have written or damaged, and folders that results will go to; needs no torch."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_object(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in a file; ValueError in one line that names the file and says that `what` was expected."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected {what}, but it is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected {what}, got a JSON {type(found).__name__}")
    return found


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file with one a line; nothing of a file that is not there.

    Lines that hold none do not count: an interruption cuts the last one off.
    """
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            yield record


def refuse_to_lose(folder: Path, *names: str, unless: str) -> None:
    """ValueError in one line for a path that is no folder, or files of these names in it, which would be lost."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output {folder} is a file; expected a folder")
    there = [name for name in names if (folder / name).exists()]
    if there:
        raise ValueError(f"{folder} already holds {there[0]}, which would be lost; give another --output{unless}")


def make_writable(folder: Path) -> None:
    """Make the folder of the results and see that it can be written, before the work and not after it."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
