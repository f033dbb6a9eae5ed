"""Which files are text that someone wrote, and that text."""

import re
import zlib
from html.parser import HTMLParser
from pathlib import PurePosixPath

CODE = (
    "c cc cpp cxx h hh hpp s py pyi pyx pxd java go rs js ts tsx rb pl pm erl hrl el lisp scm rkt ml mli hs pas pp "
    "tcl vim sh m r f f90 lua jl scala kt swift cs sql"
)
PROSE = "rst txt md html htm texi tex pod org yml yaml toml cfg ini"
MANUAL_PAGES = "1 2 3 4 5 6 7 8"
SUFFIXES = frozenset(f".{suffix}" for suffix in f"{CODE} {PROSE} {MANUAL_PAGES}".split())

LEFT_OUT = frozenset({"node_modules", "locale", "locales", "__pycache__", "asic_reg"})
LEFT_OUT_FILES = re.compile(r"changelog|copyright|licen[cs]e|copying|.*\.min\.|top_level|entry_points", re.IGNORECASE)

MOST_BYTES = 1_000_000  # larger files are tables
LEAST_BYTES = 200
LONGEST_LINE = 2_000  # in characters; longer ones are data or were made by a program
MEAN_LINE = 150
REPETITIVE = 0.1  # a file that zlib packs to less was made by a program
NOTICE = re.compile(r"licen[cs]|copyright|©", re.IGNORECASE)


def is_candidate(path: str, size: int) -> bool:
    """Whether a file is worth reading, by its name and size."""
    pure = PurePosixPath(path)
    return (
        pure.suffix.lower() in SUFFIXES
        and LEAST_BYTES <= size <= MOST_BYTES
        and LEFT_OUT.isdisjoint(pure.parts)
        and not any(part.startswith(".") or part.endswith(".dist-info") for part in pure.parts)
        and not LEFT_OUT_FILES.match(pure.name)
    )


def text_of(path: str, content: bytes) -> str | None:
    """The text of a file, lines ending in one newline; None where it is no text, or none that someone wrote.

    HTML gives what a browser would show.
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return None
    if "\0" in text:
        return None
    if PurePosixPath(path).suffix.lower() in (".html", ".htm"):
        text = _shown(text)
    text = "\n".join(line.rstrip() for line in text.splitlines()).strip("\n") + "\n"
    if not LEAST_BYTES <= len(text) <= MOST_BYTES:
        return None
    lines = text.split("\n")
    if max(map(len, lines)) > LONGEST_LINE or len(text) > MEAN_LINE * len(lines):
        return None
    packed = len(zlib.compress(text.encode(), 1))
    return text if packed >= REPETITIVE * len(text.encode()) else None


class Notices:
    """Takes off the notice of copyright with which a file begins, if an earlier file began with the same."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def without(self, text: str) -> str:
        while True:
            block, _, rest = text.partition("\n\n")
            if not rest or not NOTICE.search(block):
                return text
            if block not in self.seen:
                self.seen.add(block)
                return text
            text = rest.lstrip("\n")


class _Shown(HTMLParser):
    HIDDEN = frozenset({"head", "script", "style", "nav", "header", "footer", "svg", "button", "form"})
    BLOCKS = re.compile(r"p|div|section|article|h[1-6r]|li|[uod]l|d[td]|tr|table|br|blockquote|pre")

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.hidden = self.literal = 0

    def handle_starttag(self, tag: str, attributes: object) -> None:
        self.hidden += tag in self.HIDDEN
        self.literal += tag == "pre"
        if self.BLOCKS.fullmatch(tag):
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in self.HIDDEN and self.hidden > 0
        self.literal -= tag == "pre" and self.literal > 0
        if self.BLOCKS.fullmatch(tag):
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data if self.literal else re.sub(r"\s+", " ", data))


def _shown(page: str) -> str:
    parser = _Shown()
    parser.feed(page)
    parser.close()
    lines = "\n".join(line.rstrip() for line in "".join(parser.parts).split("\n"))
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"(?m)^ (?=\S)", "", lines))
