"""Work that is done once and kept: folders that appear whole or not at all, and prove that they still are.

An entry is a folder named by a key that says what is in it, so that it never has to be replaced: of two runs that
make the same one at once the first to finish wins, and the other takes its. A file in it tells the size and checksum
of every other; an entry that does not fit them is said to be damaged and made again.
"""

import json
import os
import shutil
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from nsa.training.folder import at_home

SEAL = "seal.json"
STALE_SECONDS = 2 * 86400  # what a killed run has left unfinished for so long, nobody finishes
T = TypeVar("T")


def default_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nsa"


class Cache:
    """Entries in a folder; `say` is told, in one line, of a damaged one."""

    def __init__(self, folder: Path | None = None, say: Callable[[str], None] = lambda line: None) -> None:
        self.folder, self.say = at_home(folder or default_folder()), say

    def get(self, key: str, write: Callable[[Path], None], read: Callable[[Path], T]) -> T:
        """What `read` finds in the entry, which `write` makes, in an empty folder, where there is none.

        Raises:
            OSError: the entry could not be written, in one line; nothing is left of it.
        """
        place = self.folder / key
        if place.is_dir():
            if (fault := _fault(place)) is None:
                return read(place)
            self.say(f"{place} is damaged ({fault}) and made again")
        part = self.folder / f".{key}.{os.getpid()}.part"
        try:
            self._sweep()
            part.mkdir(parents=True)
            (part / "new").mkdir()
            write(part / "new")
            _seal(part / "new")
            if place.is_dir() and _fault(place) is not None:
                os.rename(place, part / "damaged")
            if not place.is_dir():
                os.rename(part / "new", place)
        except OSError as error:
            if not (place.is_dir() and _fault(place) is None):  # unless another run has made it meanwhile
                reason = error.strerror or error
                raise OSError(
                    f"the cache could not be written to {self.folder} ({reason}); name another folder with --cache-dir"
                ) from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return read(place)

    def _sweep(self) -> None:
        for part in self.folder.glob(".*.part"):
            if time.time() - part.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(part, ignore_errors=True)


def _seal(folder: Path) -> None:
    facts = {path.name: [path.stat().st_size, _checksum(path)] for path in sorted(folder.iterdir())}
    (folder / SEAL).write_text(json.dumps(facts), encoding="utf-8")


def _fault(folder: Path) -> str | None:
    """What is wrong with an entry, None for nothing."""
    try:
        facts = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        for name, (size, checksum) in facts.items():
            if (folder / name).stat().st_size != size:
                return f"{name} is of another size"
            if _checksum(folder / name) != checksum:
                return f"{name} has another checksum"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return None


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            value = zlib.crc32(block, value)
    return value
