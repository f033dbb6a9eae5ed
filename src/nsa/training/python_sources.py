"""The Python sources on this machine: real, long, structured text that is everywhere."""

import sysconfig
from collections.abc import Iterator
from pathlib import Path

# Tables of characters and generated data: text that no one wrote and no one reads.
LEFT_OUT = frozenset({"encodings", "pydoc_data", "idlelib", "lib2to3", "test", "tests", "turtledemo", "__pycache__"})


def python_packages() -> dict[str, list[Path]]:
    """Package name -> its files or folders, sorted: those of the standard library and of what is installed."""
    packages: dict[str, list[Path]] = {}
    paths = sysconfig.get_paths()
    for root in dict.fromkeys(Path(paths[key]) for key in ("stdlib", "platlib", "purelib")):
        if not root.is_dir():
            continue
        for entry in sorted(root.iterdir()):
            is_package = entry.is_dir() and (entry / "__init__.py").exists()
            if is_package or entry.suffix == ".py":
                packages.setdefault(entry.stem if entry.is_file() else entry.name, []).append(entry)
    return {name: entries for name, entries in packages.items() if name not in LEFT_OUT}


def source_files(entries: list[Path]) -> Iterator[Path]:
    """A package's source files, in the order of their paths."""
    for entry in entries:
        if entry.is_file():
            yield entry
            continue
        for file in sorted(entry.rglob("*.py")):
            if LEFT_OUT.isdisjoint(file.relative_to(entry).parts):
                yield file
