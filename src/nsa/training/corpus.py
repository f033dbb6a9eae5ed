"""Where training text comes from: Python sources on this machine, a text file or folder, or a file of tokens.

A corpus is two lists of documents, for training and for validation, that share nothing:

- `python`: the standard library and the installed packages. The files of a package are joined, so that documents
  are long and later files use what earlier ones define. A package belongs to validation for good if a checksum of
  its name says so (one in ten).
- a folder: every readable text file in it is a document; one in ten, by a checksum of its path, is for validation.
  A folder with a folder `train` and a folder `validation` (`nsa corpus` makes one) says itself which are.
- one text file: its last tenth is for validation.
- a token file: `.npy` (any integer dtype) or `.bin` (uint16, little endian, no header); its last tenth is for
  validation.
"""

import os
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

VALIDATION_ONE_IN = 10
SPLIT = ("train", "validation")  # folders of a corpus that is split already
# Tables of characters and generated data: text that no one wrote and no one reads.
LEFT_OUT = frozenset({"encodings", "pydoc_data", "idlelib", "lib2to3", "test", "tests", "turtledemo", "__pycache__"})


@dataclass(frozen=True)
class Document:
    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents for training and for validation, as text; or, from a token file, as tokens."""

    source: str
    train: tuple[Document, ...] = ()
    validation: tuple[Document, ...] = ()
    train_tokens: np.ndarray | None = None
    validation_tokens: np.ndarray | None = None


def read_corpus(source: str, max_bytes: int) -> Corpus:
    """The corpus named by `source`: "python", or a path.

    Args:
        source: as in this module's docstring.
        max_bytes: how much text to take for training; a tenth as much for validation. Packages and files are taken
            in the order of their checksums, no package, nor document of a folder that is split, more than an eighth
            of either.

    Raises:
        ValueError: a path that is missing, unreadable or empty, in one line.
    """
    if max_bytes < 1:
        raise ValueError(f"max_bytes should be positive, got {max_bytes}")
    if source == "python":
        return _gather(source, _python_packages(), max_bytes)
    path = Path(source).expanduser()
    if not path.exists():
        raise ValueError(f"data source {source!r}: no such file or folder, and not the word 'python'")
    if path.is_dir():
        split = (path / "train").is_dir() and (path / "validation").is_dir()
        found = sorted(file for part in (SPLIT if split else (".",)) for file in (path / part).rglob("*"))
        files = {str(file.relative_to(path)): [file] for file in found if _is_candidate(file, path)}
        if not files:
            raise ValueError(f"data source {source!r}: the folder holds no files")
        if not split:
            return _gather(source, files, max_bytes, whole_files=True)
        for part in SPLIT:
            if not any(name.startswith(part + os.sep) for name in files):
                raise ValueError(f"data source {source!r}: its folder {part} holds no files")
        return _gather(source, files, max_bytes, held_out=_in_validation)
    if path.suffix in (".npy", ".bin"):
        return _token_file(source, path)
    text = _read(path)
    if text is None:
        raise ValueError(f"data source {source!r}: not readable as UTF-8 text")
    if not text:
        raise ValueError(f"data source {source!r}: the file is empty")
    cut = len(text) - len(text) // VALIDATION_ONE_IN
    cut = text.rfind("\n", 0, cut) + 1 or cut
    train, validation = text[:cut][:max_bytes], text[cut:][: max(1, max_bytes // VALIDATION_ONE_IN)]
    return Corpus(source, (Document(path.name, train),), (Document(path.name, validation),))


def is_for_validation(name: str) -> bool:
    """A fixed property of a package's or file's name, the same on every machine."""
    return zlib.crc32(name.encode(errors="surrogateescape")) % VALIDATION_ONE_IN == 0


def _in_validation(path: str) -> bool:
    return Path(path).parts[0] == "validation"


def _python_packages() -> dict[str, list[Path]]:
    """Package name -> its source files, sorted: those of the standard library and of what is installed."""
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


def _files(entry: Path) -> Iterator[Path]:
    if entry.is_file():
        yield entry
        return
    for file in sorted(entry.rglob("*.py")):
        if LEFT_OUT.isdisjoint(file.relative_to(entry).parts):
            yield file


def _gather(
    source: str,
    groups: dict[str, list[Path]],
    max_bytes: int,
    *,
    whole_files: bool = False,
    held_out: Callable[[str], bool] = is_for_validation,
) -> Corpus:
    """One document a group, until there is enough of each kind."""
    wanted = {False: max_bytes, True: max(1, max_bytes // VALIDATION_ONE_IN)}
    largest = {kind: max(1, size // 8) for kind, size in wanted.items()}  # so that no kind is one package
    kinds: dict[bool, list[Document]] = {False: [], True: []}
    for name in sorted(groups, key=lambda name: (zlib.crc32(name.encode(errors="surrogateescape")), name)):
        kind = held_out(name)
        room = min(wanted[kind], largest[kind]) if not whole_files else wanted[kind]
        if room <= 0:
            continue
        texts: list[str] = []
        for entry in groups[name]:
            for file in [entry] if whole_files else _files(entry):
                text = _read(file)
                if text and room > 0:
                    texts.append(text[:room])
                    room -= len(texts[-1])
        if texts:
            document = Document(name, "\n".join(texts))
            kinds[kind].append(document)
            wanted[kind] -= len(document.text)
        if max(wanted.values()) <= 0:
            break
    if not kinds[False]:
        raise ValueError(f"data source {source!r}: none of its {len(groups)} files is readable as UTF-8 text")
    if not kinds[True]:  # too few files for one in ten: the last becomes validation, or its last tenth
        last = kinds[False].pop()
        cut = 0 if kinds[False] else len(last.text) - len(last.text) // VALIDATION_ONE_IN
        kinds[True].append(Document(last.name, last.text[cut:]))
        if cut:
            kinds[False].append(Document(last.name, last.text[:cut]))
    return Corpus(source, tuple(kinds[False]), tuple(kinds[True]))


def _token_file(source: str, path: Path) -> Corpus:
    try:
        if path.suffix == ".npy":
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            tokens = np.memmap(path, dtype="<u2", mode="r")
    except (OSError, ValueError) as error:
        raise ValueError(f"data source {source!r}: not a token file ({error})") from error
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"data source {source!r}: expected one row of integers, got shape {tokens.shape} of {tokens.dtype}"
        )
    cut = len(tokens) - len(tokens) // VALIDATION_ONE_IN
    return Corpus(source, train_tokens=tokens[:cut], validation_tokens=tokens[cut:])


def _is_candidate(file: Path, root: Path) -> bool:
    return file.is_file() and not any(part.startswith(".") for part in file.relative_to(root).parts)


def _read(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
