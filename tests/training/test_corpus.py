"""Corpora: what is held out shares nothing with training, budgets are kept, and faults are one line."""

import numpy as np
import pytest

from nsa.training.corpus import is_for_validation, read_corpus
from nsa.training.python_sources import LEFT_OUT


def names(documents):
    return {document.name for document in documents}


def size(documents):
    return sum(len(document.text) for document in documents)


def test_pythons_held_out_packages_are_disjoint_and_the_same_for_every_budget():
    small, large = read_corpus("python", 300_000), read_corpus("python", 1_000_000)
    for corpus in (small, large):
        assert not names(corpus.train) & names(corpus.validation)
        assert not any(map(is_for_validation, names(corpus.train)))
        assert all(map(is_for_validation, names(corpus.validation)))
        assert not names(corpus.train) & LEFT_OUT
    assert names(small.train) <= names(large.train)
    assert 0.9 * 300_000 < size(small.train) <= 300_000 + 1000
    assert max(len(document.text) for document in small.train) <= 300_000 // 8 + 1000  # no package is most of it
    assert "def " in small.train[0].text


def test_a_corpus_is_the_same_each_time():
    assert read_corpus("python", 200_000) == read_corpus("python", 200_000)


def test_a_folders_files_are_documents_and_unreadable_ones_are_passed_over(tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"file {i}\n" * 5)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x80")
    (tmp_path / ".hidden").write_text("no")
    corpus = read_corpus(str(tmp_path), 10**6)
    found = names(corpus.train) | names(corpus.validation)
    assert found == {f"{i}.txt" for i in range(40)}
    assert not names(corpus.train) & names(corpus.validation)
    assert corpus.validation


def test_of_one_file_the_last_tenth_is_held_out(tmp_path):
    file = tmp_path / "book.txt"
    lines = [f"line {i}\n" for i in range(1000)]
    file.write_text("".join(lines))
    corpus = read_corpus(str(file), 10**6)
    assert corpus.train[0].text + corpus.validation[0].text == "".join(lines)
    assert 0.09 < size(corpus.validation) / len("".join(lines)) < 0.11
    assert size(read_corpus(str(file), 500).train) == 500


@pytest.mark.parametrize("suffix", [".npy", ".bin"])
def test_a_token_file_is_read_as_its_tokens(tmp_path, suffix):
    tokens = (np.arange(1000) * 7 % 300).astype(np.uint16)
    path = tmp_path / f"tokens{suffix}"
    np.save(path, tokens) if suffix == ".npy" else tokens.astype("<u2").tofile(path)
    corpus = read_corpus(str(path), 10**6)
    (first,), (last,) = corpus.train_tokens, corpus.validation_tokens
    assert np.array_equal(np.concatenate([first, last]), tokens)
    assert len(last) == 100


def test_faults_are_one_line(tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9")
    (tmp_path / "folder").mkdir()
    np.save(tmp_path / "floats.npy", np.zeros(10))
    np.save(tmp_path / "square.npy", np.zeros((3, 3), np.int64))
    (tmp_path / "broken.npy").write_text("not numpy")
    cases = {
        "missing": "no such file or folder",
        "empty.txt": "the file is empty",
        "latin.txt": "not readable as UTF-8 text",
        "folder": "the folder holds no files",
        "floats.npy": r"expected one row of integers, got shape \(10,\) of float64",
        "square.npy": r"got shape \(3, 3\) of int64",
        "broken.npy": "not a token file",
    }
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message) as caught:
            read_corpus(str(tmp_path / name), 100)
        assert "\n" not in str(caught.value)
