"""Tokenizers that AutoTokenizer loads from a checkpoint's folder: one token a byte, or a BPE of the corpus.

Both are byte-level, so that any text at all survives encoding and decoding.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from nsa.training.cache import Cache

SPECIAL_TOKENS = ("<bos>", "<eos>", "<pad>")
BYTES_VOCABULARY = 256 + len(SPECIAL_TOKENS)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: the id of a byte is its value; <bos>, <eos> and <pad> are 256, 257 and 258."""
    vocabulary = {letter: byte for byte, letter in enumerate(_letters_of_bytes())}
    return _wrap(Tokenizer(models.BPE(vocab=vocabulary, merges=[])))


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with `vocab_size` tokens, the special ones included, trained on `texts`."""
    if vocab_size < BYTES_VOCABULARY:
        raise ValueError(f"a BPE needs a vocab_size of at least {BYTES_VOCABULARY}, got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrap(tokenizer)


def cached_bpe(texts: Sequence[str], vocab_size: int, key: str, cache: Cache) -> PreTrainedTokenizerFast:
    """`train_bpe`, or what it gave for the same `key` before: a fingerprint of the texts."""

    def write(folder: Path) -> None:
        trained = train_bpe(texts, vocab_size).backend_tokenizer.to_str()
        (folder / "tokenizer.json").write_text(trained, encoding="utf-8")

    def read(folder: Path) -> PreTrainedTokenizerFast:
        return _wrap(Tokenizer.from_file(str(folder / "tokenizer.json")))

    return cache.get(f"bpe-{key}-{vocab_size}-{tokenizers.__version__}", write, read)


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """The same for tokenizers that give the same ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    kind = type(tokenizer).__name__
    text = backend.to_str() if backend is not None else json.dumps([kind, sorted(tokenizer.get_vocab().items())])
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def load_tokenizer(folder: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder; ValueError with one line if there is none, whatever a damaged file makes of it."""
    try:
        found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
        found.encode("a")  # values of wrong types are met only here
    except Exception as error:
        raise ValueError(f"no tokenizer could be loaded from {folder} ({first_line(error)})") from error
    if len(found) <= len(found.get_added_vocab()):  # transformers' answer where a family's files are not there
        raise ValueError(
            f"no tokenizer could be loaded from {folder} (it has special tokens alone: are files missing?)"
        )
    return found


def first_line(error: BaseException) -> str:
    """An error of another library as part of a line of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):  # what it announces
        return f"{lines[0]} {lines[1]}"
    return lines[0] if lines else type(error).__name__


def is_byte_tokenizer(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the id of every byte is its value: a BPE may have as many tokens, in another order."""
    return len(tokenizer) == BYTES_VOCABULARY and (
        tokenizer.convert_tokens_to_ids(_letters_of_bytes()) == list(range(256))
    )


def encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], Sequence[int]]:
    """str -> ids without special tokens; for bytes the short way, which gives the same ids."""
    if is_byte_tokenizer(tokenizer):
        return partial(str.encode, errors="surrogatepass")
    return partial(tokenizer.encode, add_special_tokens=False)


def _letters_of_bytes() -> list[str]:
    """The letter that stands for each byte inside a byte-level tokenizer, in the order of the bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + place) for place, byte in enumerate(hidden)}
    return [letters[byte] for byte in range(256)]


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    bos, eos, pad = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        clean_up_tokenization_spaces=False,
        model_max_length=1 << 30,
        split_special_tokens=True,
    )
