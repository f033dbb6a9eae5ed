"""One run in a folder at a time: a lock that goes with its process, however that ends."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Inside the block the folder is this run's; it is made if need be, and goes again if nothing was put into it.

    Raises:
        ValueError: another run has it, or it is a file, in one line.
    """
    if folder.is_file():
        raise ValueError(f"{folder} is a file; expected a folder as --out")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = _lock(folder / LOCK_FILE)
    try:
        yield
    finally:
        if made and os.listdir(folder) == [LOCK_FILE]:
            (folder / LOCK_FILE).unlink()
            for path in made:
                if not os.listdir(path):
                    path.rmdir()
        os.close(lock)


def _lock(path: Path) -> int:
    """The open file that holds the lock until it is closed."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(path) and os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        except BlockingIOError:
            os.close(file)
            raise ValueError(f"{path.parent}: another run is at work in this folder; choose another --out") from None
        os.close(file)  # removed between opening and locking: by a run that had put nothing there
