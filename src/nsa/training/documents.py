"""A corpus as tokens, once made and then kept in a memory-mapped file."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from nsa.training.cache import Cache
from nsa.training.corpus import Corpus
from nsa.training.readers import Document
from nsa.training.retrieval import Encode
from nsa.training.tokenizer import encoder, fingerprint, is_byte_tokenizer

BATCH_CHARACTERS = 2_000_000 * (os.cpu_count() or 1)  # for the tokenizer at once, which gives a core a document
FORMAT = 1  # of the cached files


class Documents:
    """Tokens of documents, one after the other, and where each begins."""

    def __init__(self, tokens: np.ndarray, starts: Sequence[int] | np.ndarray) -> None:
        self.tokens = tokens
        self.starts = np.asarray([*starts, len(tokens)], dtype=np.int64)

    @classmethod
    def from_texts(cls, documents: Sequence[Document], encode: Encode, dtype: type = np.uint32) -> "Documents":
        encoded = [_as_array(encode(document.text), dtype) for document in documents]
        starts = np.cumsum([0, *(len(ids) for ids in encoded)])[:-1]
        return cls(np.concatenate(encoded) if encoded else np.zeros(0, dtype), starts.tolist())

    def __getstate__(self) -> dict[str, Any]:
        """A memory-mapped file travels to another process as its name, not as its content."""
        file = self.tokens
        while isinstance(file, np.memmap) and isinstance(file.base, np.memmap):
            file = file.base
        if not isinstance(file, np.memmap):
            return {"starts": self.starts, "tokens": self.tokens}
        offset = file.offset + self.tokens.ctypes.data - file.ctypes.data
        return {"starts": self.starts, "file": (file.filename, self.tokens.dtype, offset, self.tokens.shape)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.starts = state["starts"]
        if "tokens" in state:
            self.tokens = state["tokens"]
        else:
            name, dtype, offset, shape = state["file"]
            self.tokens = np.memmap(name, dtype=dtype, mode="r", offset=offset, shape=shape)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)

    def require(self, length: int, what: str) -> None:
        """ValueError if no document holds a sequence of `length` tokens."""
        longest = int(self.lengths.max(initial=0))
        if longest < length:
            raise ValueError(
                f"the {what} is too small for one sequence of {length} tokens: it has {len(self.tokens)} tokens in "
                f"{len(self.lengths)} documents, the longest {longest}"
            )


def tokenized(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, cache: Cache) -> tuple[Documents, Documents]:
    """The corpus as tokens, for training and for validation.

    Text is tokenized once, into an entry of the cache that is named by the text and the tokenizer. The bytes of a text
    are its tokens already, and one file of tokens is what it is: both stay out of the cache.

    Raises:
        ValueError: a token that the tokenizer does not have, in one line.
        OSError: the cache could not be written, in one line.
    """
    sides: tuple[tuple[tuple[Document, ...], tuple[np.ndarray, ...]], ...] = (
        (corpus.train, corpus.train_tokens),
        (corpus.validation, corpus.validation_tokens),
    )
    for _, arrays in sides:
        for tokens in arrays:
            _check_vocabulary(tokens, len(tokenizer))
    if not any(texts or len(arrays) != 1 for texts, arrays in sides):
        train, validation = (Documents(arrays[0], [0]) for _, arrays in sides)
        return train, validation
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    if is_byte_tokenizer(tokenizer):
        train, validation = (_joined(texts, arrays, encoder(tokenizer), dtype) for texts, arrays in sides)
        return train, validation

    def write(folder: Path) -> None:
        for name, (texts, arrays) in zip(("train", "validation"), sides, strict=True):
            sizes = []
            with (folder / f"{name}.tokens").open("wb") as file:
                parts: Iterable[Any] = chain(_encoded(texts, tokenizer), arrays)
                for ids in parts:
                    file.write(np.asarray(ids).astype(dtype).tobytes())
                    sizes.append(len(ids))
            np.save(folder / f"{name}.starts.npy", np.cumsum([0, *sizes])[:-1])
        (folder / "about.json").write_text(json.dumps({"dtype": np.dtype(dtype).name, "source": corpus.source}))

    def read(folder: Path) -> tuple[Documents, Documents]:
        def one(name: str) -> Documents:
            path = folder / f"{name}.tokens"
            tokens = np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)
            return Documents(tokens, np.load(folder / f"{name}.starts.npy"))

        return one("train"), one("validation")

    key = hashlib.blake2b(
        f"{FORMAT} {corpus.fingerprint} {fingerprint(tokenizer)}".encode(), digest_size=16
    ).hexdigest()
    return cache.get(f"tokens-{key}", write, read)


def _encoded(texts: Iterable[Document], tokenizer: PreTrainedTokenizerBase) -> Iterator[Sequence[int]]:
    """The ids of every text, made by as many cores as the tokenizer uses."""

    def encode(batch: list[str]) -> Iterator[Sequence[int]]:
        if batch:
            found = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)
            yield from found["input_ids"]

    batch: list[str] = []
    size = 0
    for document in texts:
        if size + len(document.text) > BATCH_CHARACTERS:
            yield from encode(batch)
            batch, size = [], 0
        batch.append(document.text)
        size += len(document.text)
    yield from encode(batch)


def _joined(texts: Sequence[Document], arrays: Sequence[np.ndarray], encode: Encode, dtype: type) -> Documents:
    found = Documents.from_texts(texts, encode, dtype)
    if not arrays:
        return found
    starts = len(found.tokens) + np.cumsum([0, *map(len, arrays)])[:-1]
    tokens = np.concatenate([found.tokens, *(tokens.astype(dtype) for tokens in arrays)])
    return Documents(tokens, np.concatenate([found.starts[:-1], starts]))


def _check_vocabulary(tokens: np.ndarray, size: int) -> None:
    for start in range(0, len(tokens), 1 << 26):  # never all of a memory-mapped file at once
        piece = tokens[start : start + (1 << 26)]
        for token in (int(piece.min()), int(piece.max())):
            if not 0 <= token < size:
                raise ValueError(
                    f"the data holds the token {token}, but the tokenizer has {size}; name its own with --tokenizer"
                )


def _as_array(ids: Sequence[int], dtype: type) -> np.ndarray:
    return (np.frombuffer(ids, np.uint8) if isinstance(ids, bytes) else np.asarray(ids)).astype(dtype)
