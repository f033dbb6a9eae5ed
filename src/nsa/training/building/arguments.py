"""The arguments of `nsa corpus`."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class CorpusArguments:
    """Build a training corpus from packages: sources and documentation of PyPI's wheels and Debian's packages.

    They are downloaded by name and version with pip and apt-get (1.7 GB, once); nothing of them is installed or run.
    Files that occur twice are left out, the files of a package are joined to documents of up to 8 MB, and some
    packages are held out whole: the folders train and validation, which `nsa train --data` and `nsa eval` keep
    apart. CONTENTS.csv lists packages, versions, licences and sizes. A run that was stopped goes on where it was.

    Examples:
        nsa corpus
        nsa corpus --out ~/corpus
        nsa train --preset small --data ~/corpus --max-bytes 1000000000
        nsa corpus --out ~/mine --table packages.csv
    """

    out: Path = Path("~/.cache/nsa/corpus")
    """Folder of the corpus; it appears when all of it is there."""
    downloads: Path | None = None
    """Folder for the packages, which may be removed afterwards. Default: that of the corpus, with .downloads."""
    table: Path | None = None
    """Which packages: lines of registry (pypi, debian), split (train, validation), name, version (of pypi's), licence.
    Default: the library's own table, src/nsa/training/building/packages.csv."""
    skip_missing: bool = False
    """Go on without packages of PyPI that cannot be downloaded. (Debian's are left out, with a line.)"""
    overwrite: bool = False
    """Build again although there is a corpus in --out."""
