"""Tokenizers that AutoTokenizer loads from a checkpoint's folder: one token a byte, or a BPE of the corpus.

Both are byte-level, so that any text at all survives encoding and decoding.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<bos>", "<eos>", "<pad>")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: the id of a byte is its value; <bos>, <eos> and <pad> are 256, 257 and 258."""
    vocabulary = {letter: byte for byte, letter in enumerate(_letters_of_bytes())}
    return _wrap(Tokenizer(models.BPE(vocab=vocabulary, merges=[])))


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with `vocab_size` tokens, the special ones included, trained on `texts`."""
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"a BPE needs a vocab_size of at least {smallest}, got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrap(tokenizer)


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder; ValueError with one line if there is none."""
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer could be loaded from {folder}") from error


def is_byte_tokenizer(tokenizer: PreTrainedTokenizerBase) -> bool:
    return len(tokenizer) == 256 + len(SPECIAL_TOKENS)


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
