"""The table of packages: a corpus is fixed by it."""

import csv
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

OWN_TABLE = Path(__file__).parent / "packages.csv"
COLUMNS = ("registry", "split", "name", "version", "licence")


@dataclass(frozen=True)
class Package:
    """One line. A version is exact for pypi; none is given for debian, which serves one a release."""

    registry: Literal["pypi", "debian"]
    split: Literal["train", "validation"]
    name: str
    version: str
    licence: str


def read_table(path: Path) -> list[Package]:
    """The packages of a table, those of validation first, so that what they share with others is left out there.

    Raises:
        ValueError: a table that is missing, or a line of it that is none, in one line with its number.
    """
    if not path.is_file():
        raise ValueError(f"no such table of packages: {path}")
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    if not rows or tuple(rows[0]) != COLUMNS:
        raise ValueError(f"{path}: expected the first line {','.join(COLUMNS)}")
    packages = []
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(COLUMNS):
            raise ValueError(f"{path}, line {number}: expected {len(COLUMNS)} columns, got {len(row)}")
        registry, split, name, version, licence = row
        if registry not in ("pypi", "debian") or split not in ("train", "validation") or not name or not licence:
            raise ValueError(
                f"{path}, line {number}: expected pypi or debian, train or validation, a name, a version, a licence; "
                f"got {','.join(row)}"
            )
        if (registry == "pypi") != bool(version):
            raise ValueError(f"{path}, line {number}: {name} should have a version if, and only if, it is of pypi")
        packages.append(Package(cast(Any, registry), cast(Any, split), name, version, licence))
    twice = [name for name, count in Counter(package.name.lower() for package in packages).items() if count > 1]
    if twice:
        raise ValueError(f"{path}: {', '.join(twice)} named more than once")
    if len({package.split for package in packages}) < 2:
        raise ValueError(f"{path}: expected packages for train and for validation")
    return sorted(packages, key=lambda package: package.split != "validation")
