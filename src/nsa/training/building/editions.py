"""A document that a package has more than once: in other languages, or as a page made from a source."""

import re
from collections.abc import Iterable
from pathlib import PurePosixPath

LANGUAGE = re.compile(r"[a-z]{2}([-_][A-Z]{2})?")
SOURCES = (".rst", ".rst.txt")


def other_editions(paths: Iterable[str]) -> set[str]:
    """Those of a package's paths that lie in a language's folder beside an English one, or are a page whose source
    is there too (html/library/os.html with html/_sources/library/os.rst.txt)."""
    split = {path: PurePosixPath(path).parts for path in paths}
    english = {parts[:i] for parts in split.values() for i, part in enumerate(parts[:-1]) if _is_english(part)}
    sources = {_key(path) for path in split if path.endswith(SOURCES)}
    return {
        path
        for path, parts in split.items()
        if (path.endswith((".html", ".htm")) and _key(path) in sources)
        or any(
            LANGUAGE.fullmatch(part) and not _is_english(part) and parts[:i] in english
            for i, part in enumerate(parts[:-1])
        )
    }


def _is_english(folder: str) -> bool:
    return re.fullmatch(r"en([-_][A-Z]{2})?", folder) is not None


def _key(path: str) -> tuple[str, str]:
    parts = [part for part in PurePosixPath(path).parts if part != "_sources"]
    return "".join(parts[-2:-1]), parts[-1].split(".")[0]
