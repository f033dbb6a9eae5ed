"""Held-out text: what needles are hidden in, and what losses are measured on."""

from functools import lru_cache
from pathlib import Path
from typing import Any

from nsa.training.corpus import read_corpus
from nsa.training.tokenizer import encoder

PYTHON_BYTES = 10_000_000  # of the `python` corpus, of which a tenth is held out
MAX_CHARACTERS = 4_000_000  # as much as any task draws from; the rest of a large folder is not read


@lru_cache(maxsize=4)
def held_out_texts(text: str | None) -> tuple[str, ...]:
    """Documents of a file or folder; None takes the held-out packages of the `python` corpus."""
    if text is None:
        return python_held_out()
    path = Path(text)
    if not path.exists():
        raise ValueError(f"no such text: {path} (expected a file or folder of held-out text)")
    paths = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    documents, total = [], 0
    for file in paths:
        document = file.read_bytes()[:MAX_CHARACTERS].decode("utf-8", errors="replace")
        if document.strip():
            documents.append(document)
            total += len(document)
        if total >= MAX_CHARACTERS:
            break
    if not documents:
        raise ValueError(f"no text in {path}")
    return tuple(documents)


def python_held_out() -> tuple[str, ...]:
    """The packages that `nsa train` on the `python` corpus keeps for validation, whatever its size."""
    corpus = read_corpus("python", max_bytes=PYTHON_BYTES)
    return tuple(document.text for document in corpus.validation)


@lru_cache(maxsize=4)
def held_out_text(text: str | None) -> str:
    """All documents as one text, for filler."""
    return "\n".join(held_out_texts(text))


def held_out_documents(text: str | None, tokenizer: Any) -> list[list[int]]:
    """The documents as tokens, without special ones."""
    encode = encoder(tokenizer)
    return [list(encode(document)) for document in held_out_texts(text)]
