"""The files inside a wheel or a Debian package, read one after the other without unpacking anything to disk."""

import gzip
import io
import lzma
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

BROKEN = (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError)
TARS = (".tar", ".tar.gz", ".tar.xz", ".tar.bz2", ".tgz")


class Member(NamedTuple):
    """`read` gives the bytes, and only until the next member is asked for; `size` is that of the stored file."""

    path: str
    size: int
    read: Callable[[], bytes]


def members(archive: Path) -> Iterator[Member]:
    """Every file of a package, those of archives inside it included (sources come as one in Debian's packages).

    Raises:
        BROKEN: an archive that is broken; so may a member's `read`.
    """
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as opened:
            yield from _of_zip(opened)
    else:
        yield from _of_debian_package(archive)


def _of_debian_package(archive: Path) -> Iterator[Member]:
    with subprocess.Popen(
        ["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None  # a pipe was asked for
        try:
            yield from _of_tar(process.stdout)
            process.stdout.read()
        finally:
            process.stdout.close()
            failed = process.wait() > 0
    if failed:
        raise tarfile.ReadError("dpkg-deb could not read it")


def _of_tar(stream: IO[bytes], inner: bool = False) -> Iterator[Member]:
    """Archives inside are opened one level deep, as far as they are whole: the others are made for tests."""
    with tarfile.open(fileobj=stream, mode="r|*") as tar:
        for entry in tar:
            if not entry.isfile():
                continue
            path = entry.name.removeprefix("./")
            if path.endswith(TARS) and not inner:
                with suppress(*BROKEN):
                    yield from _of_tar(_stream(tar, entry), inner=True)
            elif path.endswith(".zip") and not inner:
                with suppress(*BROKEN), zipfile.ZipFile(io.BytesIO(_read(tar, entry))) as opened:
                    yield from _of_zip(opened)
            elif path.endswith(".gz"):
                yield Member(path.removesuffix(".gz"), entry.size, partial(_gunzip, tar, entry))
            else:
                yield Member(path, entry.size, partial(_read, tar, entry))


def _of_zip(opened: zipfile.ZipFile) -> Iterator[Member]:
    for entry in opened.infolist():
        if not entry.is_dir():
            yield Member(entry.filename, entry.file_size, partial(opened.read, entry))


def _stream(tar: tarfile.TarFile, entry: tarfile.TarInfo) -> Any:
    stream = tar.extractfile(entry)
    assert stream is not None  # it is a file
    return stream


def _read(tar: tarfile.TarFile, entry: tarfile.TarInfo) -> bytes:
    return _stream(tar, entry).read()


def _gunzip(tar: tarfile.TarFile, entry: tarfile.TarInfo) -> bytes:
    try:
        return gzip.decompress(_read(tar, entry))
    except (OSError, EOFError, zlib.error):  # a name that says more than is true
        return b""
