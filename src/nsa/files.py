"""Files that appear whole or not at all."""

from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write beside `path` and rename: a full disk or Ctrl-C leaves the file of before, not half of a new one."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; expected the name of a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
