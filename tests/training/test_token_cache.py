"""Work done once: what the cache gives is what was made, whole or not at all, and damage is found and mended."""

import pickle

import numpy as np
import pytest

from nsa.training import documents as module
from nsa.training.cache import SEAL, Cache
from nsa.training.corpus import Corpus
from nsa.training.documents import Documents, tokenized
from nsa.training.readers import Document
from nsa.training.tokenizer import byte_tokenizer, cached_bpe, encoder, fingerprint, train_bpe

BPE = train_bpe(["the quick brown fox jumps over the lazy dog\n" * 20], 300)
CORPUS = Corpus(
    "test",
    train=tuple(Document(f"{i}", f"fox {i} jumps over {'the lazy dog ' * i}\n") for i in range(9)),
    validation=(Document("v", "a quick dog"), Document("empty", "")),
    train_tokens=(np.arange(7), np.arange(3)),
)


def assert_right(found, tokenizer=BPE):
    encode = encoder(tokenizer)
    expected = [[*map(encode, (d.text for d in CORPUS.train)), range(7), range(3)], [encode("a quick dog"), []]]
    for side, documents in zip(expected, found, strict=True):
        parts = np.split(documents.tokens, documents.starts[1:-1])
        assert [part.tolist() for part in parts] == [list(ids) for ids in side]


@pytest.fixture
def said():
    return []


@pytest.fixture
def cache(tmp_path, said):
    return Cache(tmp_path / "cache", said.append)


def test_tokens_are_those_of_the_tokenizer_and_come_from_the_file_the_next_time(cache, monkeypatch, said):
    assert_right(tokenized(CORPUS, BPE, cache))
    monkeypatch.setattr(module, "_encoded", lambda *_: pytest.fail("tokenized again"))
    found = tokenized(CORPUS, BPE, cache)
    assert_right(found)
    assert isinstance(found[0].tokens, np.memmap)
    assert not said
    assert not list(cache.folder.glob(".*"))


def test_small_batches_give_the_same_tokens(cache, monkeypatch):
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 50)
    assert_right(tokenized(CORPUS, BPE, cache))


def test_bytes_are_tokens_without_a_cache(cache):
    assert_right(tokenized(CORPUS, byte_tokenizer(), cache), byte_tokenizer())
    assert not cache.folder.exists()


def test_another_text_or_tokenizer_is_another_entry(cache):
    other = Corpus("test", train=(Document("0", "fox 0"), *CORPUS.train[1:]), validation=CORPUS.validation)
    assert CORPUS.fingerprint != other.fingerprint
    assert fingerprint(BPE) != fingerprint(train_bpe(["pack my box with five dozen jugs"], 280))
    tokenized(CORPUS, BPE, cache)
    tokenized(other, BPE, cache)
    assert len(list(cache.folder.iterdir())) == 2


def test_the_same_text_in_other_documents_is_another_content():
    one, two = (
        Corpus("test", train=tuple(Document("n", text) for text in texts)) for texts in (("ab", "c"), ("a", "bc"))
    )
    assert one.fingerprint != two.fingerprint
    assert Corpus("", train=CORPUS.validation).fingerprint != Corpus("", validation=CORPUS.validation).fingerprint


@pytest.mark.parametrize("damage", ["shorter", "bit", "seal", "gone", "starts"])
def test_a_damaged_entry_is_made_again_and_that_is_said(cache, said, damage):
    tokenized(CORPUS, BPE, cache)
    (entry,) = cache.folder.iterdir()
    tokens = entry / "train.tokens"
    raw = tokens.read_bytes()
    if damage == "shorter":
        tokens.write_bytes(raw[:-1])
    elif damage == "bit":
        tokens.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    elif damage == "seal":
        (entry / SEAL).write_text("[")
    elif damage == "gone":
        tokens.unlink()
    else:
        (entry / "train.starts.npy").write_bytes(b"")
    assert_right(tokenized(CORPUS, BPE, cache))
    assert len(said) == 1
    assert f"{entry} is damaged (" in said[0]
    assert tokens.read_bytes() == raw
    assert_right(tokenized(CORPUS, BPE, cache))
    assert len(said) == 1


def test_a_full_disk_leaves_nothing_and_one_line(cache, monkeypatch):
    def full(file, array):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(
        OSError, match=r"the cache could not be written to .* \(No space left on device\); .*--cache-dir"
    ):
        tokenized(CORPUS, BPE, cache)
    assert not list(cache.folder.iterdir())


def test_of_two_at_once_the_first_to_finish_wins_and_both_read_it(cache):
    def write(folder):  # while this one writes, the other finishes
        if not list(cache.folder.glob("key")):
            (folder / "value").write_text("mine")
            Cache(cache.folder).get("key", lambda other: (other / "value").write_text("theirs"), read)

    def read(folder):
        return (folder / "value").read_text()

    original = Cache.get
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.getpid", iter((1, 2)).__next__)
        assert original(cache, "key", write, read) == "theirs"
    assert [path.name for path in cache.folder.iterdir()] == ["key"]


def test_a_trained_tokenizer_is_kept(cache):
    texts = [document.text for document in CORPUS.train]
    first = cached_bpe(texts, 290, "key", cache)
    again = cached_bpe(["nothing of this is read"], 290, "key", cache)
    direct = train_bpe(texts, 290)
    assert fingerprint(first) == fingerprint(again)
    assert first.encode("lazy fox") == again.encode("lazy fox") == direct.encode("lazy fox")


@pytest.mark.parametrize("cut", [slice(None), slice(3, 90)])
def test_memory_mapped_documents_travel_by_the_name_of_their_file(tmp_path, cut):
    np.save(tmp_path / "t.npy", np.arange(100_000))
    tokens = np.load(tmp_path / "t.npy", mmap_mode="r")[1:][cut]
    packed = pickle.dumps(Documents(tokens, [0]))
    assert len(packed) < 2000
    assert np.array_equal(pickle.loads(packed).tokens, tokens)
    whole = Documents(np.arange(5), [0, 2])
    assert np.array_equal(pickle.loads(pickle.dumps(whole)).tokens, whole.tokens)


def test_tokens_that_the_tokenizer_does_not_have_are_one_line(cache):
    for wrong in (np.array([1, 300]), np.array([-1, 5])):
        with pytest.raises(ValueError, match=r"the data holds the token (300|-1), but the tokenizer has \d+"):
            tokenized(Corpus("test", train_tokens=(wrong,), validation_tokens=(wrong,)), BPE, cache)


def test_a_bpe_as_small_as_the_bytes_is_not_taken_for_them():
    small = train_bpe(["abc"], 259)
    assert len(small) == 259
    assert list(encoder(small)("abc")) == small.encode("abc", add_special_tokens=False) != list(b"abc")
