"""Where training text comes from: Python sources on this machine, files and folders, or tokens.

A corpus is two lists of documents, for training and for validation, that share nothing:

- `python`: the standard library and the installed packages. The files of a package are joined, so that documents
  are long and later files use what earlier ones define. A package belongs to validation for good if a checksum of
  its name says so (one in ten).
- a folder, or a file of many documents (nsa.training.readers): one document in ten, by a checksum of its name, is for
  validation. A folder with a folder `train` and a folder `validation` (`nsa corpus` makes one) says itself which are.
  What is left out of a folder is counted, with the reason.
- one text, or one file of tokens: its last tenth is for validation.
"""

import hashlib
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nsa.training.folder import at_home
from nsa.training.python_sources import python_packages, source_files
from nsa.training.readers import (
    LINES,
    TABLES,
    Document,
    LeftOut,
    Unit,
    is_saved_dataset,
    read,
    read_tokens,
    units_in,
)

VALIDATION_ONE_IN = 10
SPLIT = ("train", "validation")  # folders of a corpus that is split already
PIECES, PIECE = 4096, 1 << 15  # of a token file that are looked at for its fingerprint, and the tokens in one
FULL = "--max-bytes was reached"


@dataclass(frozen=True)
class Corpus:
    """Documents for training and for validation: as text, and those of token files as tokens."""

    source: str
    train: tuple[Document, ...] = ()
    validation: tuple[Document, ...] = ()
    train_tokens: tuple[np.ndarray, ...] = ()
    validation_tokens: tuple[np.ndarray, ...] = ()
    remarks: tuple[str, ...] = ()
    """What a user should know: what was left out and why, each a line."""

    @cached_property
    def fingerprint(self) -> str:
        """Of names and texts, and of tokens (of many, of evenly spread pieces): another for other data."""
        found = hashlib.blake2b(digest_size=16)
        for texts in (self.train, self.validation):
            for document in texts:
                for part in (document.name, document.text):
                    data = part.encode("utf-8", "surrogatepass")
                    found.update(len(data).to_bytes(8, "little"))
                    found.update(data)
            found.update(b"|")
        for arrays in (self.train_tokens, self.validation_tokens):
            for tokens in arrays:
                found.update(f"{len(tokens)} {tokens.dtype}".encode())
                for start in range(0, len(tokens), max(PIECE, len(tokens) // PIECES)):
                    found.update(np.ascontiguousarray(tokens[start : start + PIECE]).tobytes())
            found.update(b"|")
        return found.hexdigest()


def read_corpus(source: str, max_bytes: int, text_field: str = "text") -> Corpus:
    """The corpus named by `source`: "python", or a path.

    Args:
        source: as in this module's docstring.
        max_bytes: how much text to take for training; a tenth as much for validation. Packages and files are taken
            in the order of their checksums, no package, nor document of a folder that is split, more than an eighth
            of either. Tokens are all taken.
        text_field: where the text is in lines of JSON and rows of tables.

    Raises:
        ValueError: a path that is missing, unreadable or empty, or a fault inside a file, in one line.
    """
    if max_bytes < 1:
        raise ValueError(f"max_bytes should be positive, got {max_bytes}")
    if source == "python":
        return _python(max_bytes)
    path = at_home(source)
    if not source or not path.exists():
        raise ValueError(f"data source {source!r}: no such file or folder, and not the word 'python'")
    units = list(units_in(path)) if path.is_dir() else [Unit(path, path.name)]
    split = (path / "train").is_dir() and (path / "validation").is_dir() and not is_saved_dataset(path)
    if split:
        units = [unit for unit in units if _top(unit.name) in SPLIT]
    if not units:
        raise ValueError(f"data source {source!r}: the folder holds no files")
    for part in SPLIT if split else ():
        if not any(_top(unit.name) == part for unit in units):
            raise ValueError(f"data source {source!r}: its folder {part} holds no files")
    gathered = _Gathered(max_bytes, split=split)
    for unit in sorted(units, key=lambda unit: _order(unit.name)):
        if unit.is_tokens:
            gathered.take_tokens(unit, is_only=len(units) == 1)
        elif gathered.is_full:
            gathered.leave_out(FULL, unit.name)
        elif len(units) == 1 and unit.kind not in LINES | TABLES and not is_saved_dataset(path):
            gathered.take_single_text(unit, text_field)
        else:
            gathered.take(unit, text_field)
    left_out = gathered.left_out()
    if not any(gathered.texts.values()) and not any(gathered.tokens.values()):
        reasons = "; ".join(left_out) if path.is_dir() else gathered.first_reason
        raise ValueError(f"data source {source!r}: nothing to train on: {reasons}")
    gathered.share()
    return Corpus(
        source,
        tuple(gathered.texts[False]),
        tuple(gathered.texts[True]),
        tuple(gathered.tokens[False]),
        tuple(gathered.tokens[True]),
        tuple(f"{source}: {remark}" for remark in [*left_out, *gathered.remarks]),
    )


def is_for_validation(name: str) -> bool:
    """A fixed property of a package's or file's name, the same on every machine."""
    return _order(name)[0] % VALIDATION_ONE_IN == 0


def _top(name: str) -> str:
    return Path(name).parts[0]


def _order(name: str) -> tuple[int, str]:
    return zlib.crc32(name.encode(errors="surrogateescape")), name


def _rooms(max_bytes: int) -> dict[bool, int]:
    """Characters to take, for training and for validation."""
    return {False: max_bytes, True: max(1, max_bytes // VALIDATION_ONE_IN)}


class _Gathered:
    """A corpus that is being read: documents by whether they are for validation, and what was left out."""

    def __init__(self, max_bytes: int, *, split: bool) -> None:
        """split: what is for validation is said by the folder it lies in."""
        self.room, self.split = _rooms(max_bytes), split
        self.most = {kind: max(1, room // 8) if split else room for kind, room in self.room.items()}  # of a document
        self.texts: dict[bool, list[Document]] = {False: [], True: []}
        self.tokens: dict[bool, list[np.ndarray]] = {False: [], True: []}
        self.remarks: list[str] = []
        self._reasons: Counter[str] = Counter()
        self._examples: dict[str, list[str]] = {}

    @property
    def is_full(self) -> bool:
        return max(self.room.values()) <= 0

    def leave_out(self, reason: str, name: str) -> None:
        self._reasons[reason] += 1
        names = self._examples.setdefault(reason, [])
        if name not in names and len(names) <= 3:
            names.append(name)

    def left_out(self) -> list[str]:
        return [
            f"{count:,} left out, {reason} ({', '.join(self._examples[reason][:3])}"
            + (", ...)" if len(self._examples[reason]) > 3 else ")")
            for reason, count in self._reasons.items()
        ]

    @property
    def first_reason(self) -> str:
        return next(iter(self._reasons), "no document in it")

    def take(self, unit: Unit, text_field: str) -> None:
        """The unit's documents, each where its name belongs, as long as there is room."""
        try:
            for document, held_out in read(unit, text_field, has_room=lambda kind: self.room[kind] > 0):
                if isinstance(document, LeftOut):
                    self.leave_out(str(document), unit.name)
                    continue
                self._add(document, self._is_held_out(document.name) if held_out is None else held_out)
                if self.is_full:
                    break
        except LeftOut as reason:
            self.leave_out(str(reason), unit.name)

    def take_single_text(self, unit: Unit, text_field: str) -> None:
        """The last tenth of the lines is for validation."""
        try:
            ((document, _),) = read(unit, text_field)
        except LeftOut as reason:
            self.leave_out(str(reason), unit.name)
            return
        assert isinstance(document, Document)
        for kind, part in zip((False, True), _divided(document), strict=True):
            self._add(part, kind)

    def _is_held_out(self, name: str) -> bool:
        return _top(name) == "validation" if self.split else is_for_validation(name)

    def _add(self, document: Document, kind: bool) -> None:
        room, size = min(self.room[kind], self.most[kind]), len(document.text)
        if room < size:
            is_all_there_is = room == self.room[kind]
            reason = FULL if is_all_there_is else "no document is more than an eighth of --max-bytes"
            self.leave_out(f"{reason}: the end of" if room > 0 else FULL, document.name)
        if room > 0:
            self.texts[kind].append(Document(document.name, document.text[:room]))
            self.room[kind] -= min(room, size)

    def take_tokens(self, unit: Unit, *, is_only: bool) -> None:
        try:
            tokens = read_tokens(unit.path)
        except ValueError as error:
            self.leave_out(str(error), unit.name)
            return
        if is_only:
            for kind, part in zip((False, True), _divided(tokens), strict=True):
                self.tokens[kind].append(part)
        else:
            self.tokens[self._is_held_out(unit.name)].append(tokens)

    def share(self) -> None:
        """Where all documents fell to one side, the other gets the last of them, or a share of the only one."""
        for empty in (True, False):
            if self.texts[empty] or self.tokens[empty]:
                continue
            pool: Any = self.texts if self.texts[not empty] else self.tokens
            last = pool[not empty].pop()
            if self.texts[not empty] or self.tokens[not empty]:
                pool[empty].append(last)
                continue
            for kind, part in zip((False, True), _divided(last), strict=True):
                pool[kind].append(part)
            name = last.name if isinstance(last, Document) else "one file of tokens"
            self.remarks.append(f"{name} is all there is; its last tenth is for validation, the rest to train on")


def _divided(part: Any) -> tuple[Any, Any]:
    """A document, or tokens: all but the last tenth, and the last tenth."""
    if isinstance(part, Document):
        front, back = (Document(part.name, text) for text in _split(part.text))
        return front, back
    cut = len(part) - len(part) // VALIDATION_ONE_IN
    return part[:cut], part[cut:]


def _split(text: str) -> tuple[str, str]:
    """All but the last tenth, to a whole line if there are lines; and the rest."""
    cut = len(text) - len(text) // VALIDATION_ONE_IN
    cut = text.rfind("\n", 0, cut) + 1 or cut
    return text[:cut], text[cut:]


def _python(max_bytes: int) -> Corpus:
    """One document a package, until there is enough of each kind."""
    wanted = _rooms(max_bytes)
    largest = {kind: max(1, size // 8) for kind, size in wanted.items()}  # so that no kind is one package
    kinds: dict[bool, list[Document]] = {False: [], True: []}
    packages = python_packages()
    for name in sorted(packages, key=_order):
        kind = is_for_validation(name)
        text = "\n".join(_cut_to(min(wanted[kind], largest[kind]), source_files(packages[name])))
        if text:
            kinds[kind].append(Document(name, text))
            wanted[kind] -= len(text)
        if max(wanted.values()) <= 0:
            break
    return Corpus("python", tuple(kinds[False]), tuple(kinds[True]))


def _cut_to(room: int, files: Iterable[Path]) -> Iterator[str]:
    """The texts of files, `room` characters in all."""
    for file in files:
        if room <= 0:
            return
        try:
            text = file.read_text(encoding="utf-8")[:room]
        except (OSError, UnicodeDecodeError):
            continue
        if text:
            yield text
            room -= len(text)
