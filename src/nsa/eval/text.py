"""Held-out text: what needles are hidden in, and what losses are measured on.

A source is one word, which a result file can keep:

    python           the packages that `nsa train` on the `python` corpus keeps for validation
    PATH             all of a text file, or of the files of a folder
    PATH#held-out    what `nsa train --data PATH` keeps for validation
    PATH#held-out:FIELD    the same with `--text-field FIELD`
"""

from functools import lru_cache
from typing import Any

from nsa.training.corpus import read_corpus
from nsa.training.folder import at_home
from nsa.training.tokenizer import encoder

HELD_OUT = "#held-out"
TEXT_FIELD = "text"  # of JSON's lines and tables' rows, where no other is named
PYTHON_BYTES = 10_000_000  # read of the `python` corpus, of which a tenth is held out
MAX_CHARACTERS = 4_000_000  # as much as any task draws from; the rest of a large folder is not read
MOST_OF_ONE = MAX_CHARACTERS // 8  # of a folder's document, so that the text is not one


def held_out_of(data: str, text_field: str = TEXT_FIELD) -> str:
    """The source of what `nsa train` keeps for validation of its `data`."""
    if data == "python":
        return data
    return data + HELD_OUT + ("" if text_field == TEXT_FIELD else f":{text_field}")


@lru_cache(maxsize=4)
def held_out_texts(source: str) -> tuple[str, ...]:
    """The documents of a source; ValueError in one line if there are none."""
    data, mark, field = source.rpartition(HELD_OUT)
    if source == "python" or (mark and (not field or field[0] == ":")):
        budget = PYTHON_BYTES if source == "python" else 10 * MAX_CHARACTERS
        corpus = read_corpus(data or source, budget, field[1:] if mark and field else TEXT_FIELD)
        if not corpus.validation:
            raise ValueError(f"{corpus.source} holds tokens, not text; name a text with --text")
        return tuple(document.text for document in corpus.validation)
    path = at_home(source)
    if not path.exists():
        raise ValueError(f"no such text: {path} (expected a file or folder of held-out text)")
    paths = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    documents, total = [], 0
    for file in paths:
        most = MOST_OF_ONE if len(paths) > 1 else MAX_CHARACTERS
        document = file.read_bytes()[:most].decode("utf-8", errors="replace")
        if document.strip():
            documents.append(document)
            total += len(document)
        if total >= MAX_CHARACTERS:
            break
    if not documents:
        raise ValueError(f"no text in {path}")
    return tuple(documents)


@lru_cache(maxsize=4)
def held_out_text(source: str) -> str:
    """All documents as one text, for filler."""
    return "\n".join(held_out_texts(source))


@lru_cache(maxsize=2)  # seconds for a text of a million tokens
def held_out_documents(source: str, tokenizer: Any) -> tuple[list[int], ...]:
    """The documents as tokens, without special ones."""
    encode = encoder(tokenizer)
    return tuple(list(encode(document)) for document in held_out_texts(source))
