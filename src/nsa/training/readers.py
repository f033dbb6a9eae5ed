"""How a file of each kind becomes documents.

    .jsonl, .ndjson     a document in every line, the string in its field `text_field`
    .parquet            a document in every row, likewise (extra `datasets`)
    .npy, .bin          tokens: one row of integers; uint16, little endian, without a header
    anything else       text in UTF-8, one document

each, but for tables and tokens, also as .gz. A folder that Hugging Face `datasets` saved (save_to_disk) is one unit:
its split `train`, and for validation its split `validation` or `test`; or all of it, where it has no such splits.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import numpy as np

LINES, TABLES, TOKENS = {".jsonl", ".ndjson"}, {".parquet"}, {".npy", ".bin"}
VALIDATION_SPLITS = ("validation", "valid", "dev", "test")


@dataclass(frozen=True)
class Document:
    name: str
    text: str


class LeftOut(Exception):
    """A file, or a document, that training goes without; says why."""


@dataclass(frozen=True)
class Unit:
    """A file, or a saved dataset, inside the source; `name` is its path from there."""

    path: Path
    name: str

    @property
    def kind(self) -> str:
        """The file's suffix, without .gz."""
        return (self.path.with_suffix("") if self.path.suffix == ".gz" else self.path).suffix.lower()

    @property
    def is_tokens(self) -> bool:
        return self.path.suffix.lower() in TOKENS and self.path.is_file()


def units_in(folder: Path) -> Iterator[Unit]:
    """What may be read inside a folder, in the order of names; hidden files are left out and not spoken of."""

    def walk(place: Path) -> Iterator[Unit]:
        if is_saved_dataset(place):
            yield Unit(place, str(place.relative_to(folder)))
            return
        for path in sorted(place.iterdir()):
            if path.name.startswith("."):
                continue
            if path.is_dir():
                yield from walk(path)
            elif path.is_file():
                yield Unit(path, str(path.relative_to(folder)))

    return walk(folder)


def is_saved_dataset(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def read(
    unit: Unit, text_field: str, has_room: Callable[[bool], bool] = lambda kind: True
) -> Iterator[tuple[Document | LeftOut, bool | None]]:
    """Documents of a unit in their order, each with whether it is for validation where the unit itself says so.

    `has_room` is asked whether more is wanted for validation (True), or for training, where a unit could skip the rest.

    Raises:
        LeftOut: what is no text, with the reason.
        ValueError: what only the user can mend, such as a line without the field, in one line with its place.
    """
    if unit.path.is_dir():
        yield from _dataset(unit, text_field, has_room)
    elif unit.kind in TABLES:
        yield from ((document, None) for document in _parquet(unit, text_field))
    elif unit.kind in LINES:
        yield from ((document, None) for document in _lines(unit, text_field))
    elif unit.kind == ".json":
        raise LeftOut("JSON in one piece; .jsonl has a line for every document")
    else:
        yield Document(unit.name, _whole_text(unit)), None


def read_tokens(path: Path) -> np.ndarray:
    """The tokens of a file, memory-mapped; ValueError with the reason where it holds none."""
    try:
        tokens = np.lib.format.open_memmap(path, mode="r") if path.suffix.lower() == ".npy" else _raw(path)
    except Exception as error:  # a damaged header makes numpy raise nearly anything
        raise ValueError(f"not a token file ({str(error).splitlines()[0] if str(error) else 'damaged'})") from error
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"expected one row of integers, got shape {tokens.shape} of {tokens.dtype}")
    if not len(tokens):
        raise ValueError("the file is empty")
    return tokens


def _raw(path: Path) -> np.ndarray:
    return np.memmap(path, dtype="<u2", mode="r") if path.stat().st_size else np.zeros(0, "<u2")


def _open(unit: Unit) -> BufferedIOBase:
    return gzip.open(unit.path, "rb") if unit.path.suffix == ".gz" else unit.path.open("rb")


def _whole_text(unit: Unit) -> str:
    with _damage(), _open(unit) as file:
        text = file.read().decode("utf-8")
    if not text:
        raise LeftOut("the file is empty")
    # As Python reads text: every line ends with \n.
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


class _damage:
    """What reading raises where a file is damaged or is no text: LeftOut with the reason."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, UnicodeDecodeError):
            raise LeftOut("not readable as UTF-8 text") from error
        if isinstance(error, (gzip.BadGzipFile, zlib.error, EOFError)):
            raise LeftOut("a damaged .gz from some place on") from error
        if isinstance(error, OSError):
            raise LeftOut(f"cannot be read: {error.strerror or error}") from error


def _lines(unit: Unit, field: str) -> Iterator[Document | LeftOut]:
    with _damage(), _open(unit) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{unit.path}, line {number}"
            try:
                values = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not UTF-8 ({error.reason})") from error
            except ValueError as error:
                raise ValueError(f"{where}: not JSON ({error})") from error
            if not isinstance(values, dict) or field not in values:
                got = f"the fields {sorted(values)[:8]}" if isinstance(values, dict) else type(values).__name__
                raise ValueError(f"{where}: expected an object with the field {field!r} (--text-field), got {got}")
            yield _document(f"{unit.name}:{number}", values[field], where, field)


def _document(name: str, text: Any, where: str, field: str) -> Document | LeftOut:
    if text is None or text == "":
        return LeftOut("no text in its field")
    if not isinstance(text, str):
        raise ValueError(f"{where}: expected text in the field {field!r} (--text-field), got {type(text).__name__}")
    return Document(name, text)


def _parquet(unit: Unit, field: str) -> Iterator[Document | LeftOut]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"{unit.path}: reading parquet needs pyarrow: pip install 'nsa[datasets]'") from None
    try:
        file = parquet.ParquetFile(unit.path)
    except (OSError, pyarrow.ArrowException) as error:
        raise LeftOut("a damaged .parquet") from error
    with file:
        if field not in file.schema_arrow.names:
            raise ValueError(_no_column(unit.path, field, file.schema_arrow.names))
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=[field]):
            for text in batch.column(0).to_pylist():
                yield _document(f"{unit.name}:{number}", text, f"{unit.path}, row {number}", field)
                number += 1


def _dataset(
    unit: Unit, field: str, has_room: Callable[[bool], bool]
) -> Iterator[tuple[Document | LeftOut, bool | None]]:
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{unit.path} is a saved dataset; reading it needs pip install 'nsa[datasets]'") from None
    try:
        found = datasets.load_from_disk(str(unit.path))
    except Exception as error:  # of another library, for damaged files: anything
        raise ValueError(f"{unit.path}: the saved dataset cannot be read ({str(error).splitlines()[0]})") from error
    splits: dict[str, Any] = dict(found) if isinstance(found, datasets.DatasetDict) else {"": found}
    held_out = next((name for name in VALIDATION_SPLITS if name in splits), None) if "train" in splits else None
    used = {name: split for name, split in splits.items() if held_out is None or name in ("train", held_out)}
    for split, rows in used.items():
        if field not in rows.column_names:
            raise ValueError(_no_column(unit.path / split, field, rows.column_names))
        place = "/".join(part for part in (unit.name, split) if part not in ("", "."))
        kind = None if held_out is None else split == held_out
        for number, row in enumerate(rows.select_columns([field])):
            if kind is not None and not has_room(kind):
                break
            yield _document(f"{place}:{number}", row[field], f"{unit.path / split}, row {number}", field), kind


def _no_column(path: Path, field: str, names: list[str]) -> str:
    return f"{path}: expected a column {field!r} (--text-field), got {', '.join(names)}"
