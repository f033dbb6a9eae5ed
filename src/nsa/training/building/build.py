"""The corpus as files: train/ and validation/, a document a file, and CONTENTS.csv, which says what is in them."""

from __future__ import annotations

import csv
import hashlib
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nsa.training.building.download import download, downloaded, missing_debian_tools
from nsa.training.building.editions import other_editions
from nsa.training.building.licence import Licence
from nsa.training.building.members import BROKEN, members
from nsa.training.building.table import OWN_TABLE, Package, read_table
from nsa.training.building.text import Notices, is_candidate, text_of
from nsa.training.folder import at_home

if TYPE_CHECKING:
    from nsa.training.building.arguments import CorpusArguments

CONTENTS = "CONTENTS.csv"
DOCUMENT_BYTES = 8_000_000  # a larger package is several documents, cut between files
MOST_BYTES = {"train": 48_000_000, "validation": 8_000_000}  # of one package, so that no corpus is mostly one


def build(arguments: CorpusArguments) -> None:
    """Download what is not there yet, then write the corpus whole; one that is there is left as it is.

    Raises:
        ValueError: a faulty table, packages that could not be had, a folder that holds something else; in one line.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    out, table = at_home(arguments.out), arguments.table or OWN_TABLE
    if (out / CONTENTS).is_file() and not arguments.overwrite:
        console.print(f"{out} holds a corpus already; --overwrite builds it again")
        return
    if out.exists() and not (out / CONTENTS).is_file():
        raise ValueError(f"{out} exists and is no corpus (it has no {CONTENTS}); name another folder with --out")
    downloads = arguments.downloads or out.with_name(out.name + ".downloads")
    packages = read_table(table)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
    with Progress(*columns, console=console, transient=True) as progress:
        archives = _download_all(packages, at_home(downloads), arguments.skip_missing, progress)
        partial = out.with_name(out.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        lines = _write_all(archives, partial, progress)
    if out.exists():
        shutil.rmtree(out)
    partial.rename(out)
    for split in MOST_BYTES:
        own = [line for line in lines if line["split"] == split]
        sums = {key: sum(int(line[key]) for line in own) for key in ("documents", "bytes", "files", "duplicates")}
        console.print(
            f"{split}: {len(own)} packages, {sums['bytes'] / 1e6:.1f} MB in {sums['documents']} documents of "
            f"{sums['files']} files; {sums['duplicates']} duplicates left out"
        )
    console.print(f"wrote {out}; train on it with nsa train --data {out}")


def _download_all(
    packages: Sequence[Package], folder: Path, skip_missing: bool, progress: Progress
) -> list[tuple[Package, Path]]:
    """Debian's packages are left out, with a line, on a system that does not have its tools or such a package."""
    tools = missing_debian_tools()
    if tools and any(package.registry == "debian" for package in packages):
        progress.console.print(f"packages of Debian are left out: this system has no {' and no '.join(tools)}")
        packages = [package for package in packages if package.registry != "debian"]
    archives, missing = [], []
    bar = progress.add_task("downloading", total=len(packages))
    for package in packages:
        progress.update(bar, description=f"downloading {package.name}", refresh=True)
        try:
            archives.append((package, downloaded(package, folder) or download(package, folder)))
        except ValueError as error:
            progress.console.print(f"{error}")
            missing += [package.name] if package.registry == "pypi" else []
        progress.advance(bar)
    progress.remove_task(bar)
    if missing and not skip_missing:
        raise ValueError(
            f"{len(missing)} of {len(packages)} packages could not be downloaded: {', '.join(missing)}; run again, or "
            "go on without them with --skip-missing"
        )
    return archives


@dataclass
class _Seen:
    """What earlier packages have put into the corpus."""

    texts: set[bytes] = field(default_factory=set)
    notices: Notices = field(default_factory=Notices)


class _File(NamedTuple):
    path: str
    start: int
    size: int
    digest: bytes


def _write_all(archives: Sequence[tuple[Package, Path]], folder: Path, progress: Progress) -> list[dict[str, str]]:
    for split in MOST_BYTES:
        (folder / split).mkdir(parents=True)
    bar = progress.add_task("reading", total=len(archives))
    seen, lines = _Seen(), []
    for package, archive in archives:
        progress.update(bar, description=f"reading {package.name}", refresh=True)
        lines.append(_write(package, archive, folder / package.split, seen))
        progress.advance(bar)
    with (folder / CONTENTS).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    return lines


def _write(package: Package, archive: Path, folder: Path, seen: _Seen) -> dict[str, str]:
    """The documents of one package; returns its line of the contents."""
    licence = Licence(package)
    with tempfile.TemporaryFile(dir=folder) as spool:
        try:
            files, duplicates = _gather(archive, spool, seen, licence)
        except BROKEN as error:
            raise ValueError(f"{archive} is broken ({error}); remove it and run again") from error
        documents = _documents(sorted(files), MOST_BYTES[package.split])
        for number, document in enumerate(documents):
            name = f"{package.name}.txt" if len(documents) == 1 else f"{package.name}-{number:03}.txt"
            with (folder / name).open("wb") as out:
                for part in document:
                    spool.seek(part.start)
                    out.write(spool.read(part.size))
    kept = [part for document in documents for part in document]
    seen.texts.update(part.digest for part in kept)
    return {
        "registry": package.registry,
        "split": package.split,
        "name": package.name,
        "version": licence.version(archive),
        "licence": package.licence,
        "licence_in_package": licence.found,
        "sha256": hashlib.sha256(archive.read_bytes()).hexdigest(),
        "files": str(len(kept)),
        "duplicates": str(duplicates),
        "bytes": str(sum(part.size for part in kept)),
        "documents": str(len(documents)),
    }


def _gather(archive: Path, spool: IO[bytes], seen: _Seen, licence: Licence) -> tuple[list[_File], int]:
    """Every text of the package that no earlier one has, into `spool`, below a line with its path; how many are
    left out, for they are there already or are another edition of what is."""
    files: list[_File] = []
    own: Counter[bytes] = Counter()
    duplicates = 0
    for member in members(archive):
        licence.look_at(member)
        if not is_candidate(member.path, member.size):
            continue
        text = text_of(member.path, member.read())
        if text is None:
            continue
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        own[digest] += 1
        if digest in seen.texts or own[digest] > 1:
            duplicates += 1
            continue
        content = f"# {member.path}\n{seen.notices.without(text)}\n".encode()
        files.append(_File(member.path, spool.tell(), len(content), digest))
        spool.write(content)
    others = other_editions(part.path for part in files)
    return [part for part in files if part.path not in others], duplicates + len(others)


def _documents(files: Sequence[_File], most: int) -> list[list[_File]]:
    """Documents of much the same size; of a package with more than `most` bytes some, evenly spread over it."""
    total = sum(part.size for part in files)
    count = max(1, round(total / DOCUMENT_BYTES))
    documents: list[list[_File]] = [[] for _ in range(count)]
    place = 0
    for part in files:
        documents[min(count - 1, place * count // max(1, total))].append(part)
        place += part.size
    documents = [document for document in documents if document]
    room = max(1, most // DOCUMENT_BYTES)
    if len(documents) <= room:
        return documents
    return [documents[place * len(documents) // room] for place in range(room)]
