"""Tokenizers: any text survives, a byte's id is its value, and a checkpoint's folder gives the same tokenizer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from nsa.training.tokenizer import byte_tokenizer, encoder, load_tokenizer, train_bpe

BYTES = byte_tokenizer()
BPE = train_bpe(["the quick brown fox jumps over the lazy dog\n" * 20], 300)
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@given(text=ANY_TEXT)
def test_a_bytes_id_is_its_value_and_any_text_survives(text):
    ids = BYTES.encode(text, add_special_tokens=False)
    assert ids == list(text.encode()) == list(encoder(BYTES)(text))
    assert BYTES.decode(ids) == text


@given(text=ANY_TEXT)
def test_any_text_survives_a_bpe(text):
    ids = BPE.encode(text, add_special_tokens=False)
    assert BPE.decode(ids) == text
    assert list(encoder(BPE)(text)) == ids


def test_special_tokens_follow_the_bytes_and_are_not_found_in_text():
    assert (BYTES.bos_token_id, BYTES.eos_token_id, BYTES.pad_token_id) == (256, 257, 258)
    assert BYTES.encode("<eos>", add_special_tokens=False) == list(b"<eos>")


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
def test_auto_tokenizer_loads_it_from_a_folder(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "def f(x):\n\treturn x  # é 世界 \x00 <eos>"
    assert loaded.encode(text, add_special_tokens=False) == tokenizer.encode(text, add_special_tokens=False)
    assert loaded.decode(loaded.encode(text, add_special_tokens=False)) == text
    assert len(loaded) == len(tokenizer)


def test_a_bpe_has_the_size_asked_for_and_joins_what_is_frequent():
    assert len(BPE) <= 300
    assert len(BPE.encode("the lazy dog", add_special_tokens=False)) < 12


def test_errors_are_one_line(tmp_path):
    with pytest.raises(ValueError, match="vocab_size of at least 259, got 10"):
        train_bpe(["text"], 10)
    with pytest.raises(ValueError, match="no tokenizer could be loaded from"):
        load_tokenizer(str(tmp_path))
