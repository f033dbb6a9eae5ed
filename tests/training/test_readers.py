"""Data that users have: every kind of file gives its documents, and what is left out is said with its reason."""

import gzip
import json

import numpy as np
import pytest

from nsa.training.corpus import is_for_validation, read_corpus

STORIES = [f"Story {number}.\nIt was the {number}th night.\n" for number in range(40)]


def lines(texts, field="text"):
    return "".join(json.dumps({field: text, "id": number}) + "\n" for number, text in enumerate(texts)).encode()


def texts(corpus):
    return sorted(document.text for document in (*corpus.train, *corpus.validation))


@pytest.mark.parametrize("name", ["stories.jsonl", "stories.jsonl.gz", "stories.ndjson"])
def test_a_line_of_json_is_a_document(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(lines(STORIES)) if name.endswith("gz") else lines(STORIES))
    corpus = read_corpus(str(path), 10**6)
    assert texts(corpus) == sorted(STORIES)
    assert all(is_for_validation(document.name) for document in corpus.validation)
    assert 1 <= len(corpus.validation) <= 12
    assert not corpus.remarks


def test_the_text_lies_in_the_field_that_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(STORIES, "content"))
    assert texts(read_corpus(str(tmp_path), 10**6, "content")) == sorted(STORIES)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"content": "x"}',
            r"a.jsonl, line 3: expected an object with the field 'text' .*, got the fields \['content'\]",
        ),
        ('{"text": 7}', r"a.jsonl, line 3: expected text in the field 'text' .*, got int"),
        ('["text"]', r"a.jsonl, line 3: expected an object .*, got list"),
        ("once upon a time", "a.jsonl, line 3: not JSON"),
        (b"\xff\xfe", "a.jsonl, line 3: not UTF-8"),
    ],
)
def test_a_line_that_is_no_document_is_an_error_with_its_place(tmp_path, line, message):
    end = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "a.jsonl").write_bytes(lines(STORIES[:1]) + b"\n" + end)
    with pytest.raises(ValueError, match=message) as caught:
        read_corpus(str(tmp_path), 10**6)
    assert "\n" not in str(caught.value)


def test_compressed_text_is_text(tmp_path):
    text = "".join(STORIES)
    (tmp_path / "book.txt.gz").write_bytes(gzip.compress(text.encode()))
    corpus = read_corpus(str(tmp_path / "book.txt.gz"), 10**6)
    assert corpus.train[0].text + corpus.validation[0].text == text


def test_a_folder_mixes_all_kinds_and_says_what_it_left_out(tmp_path):
    for number, story in enumerate(STORIES[:20]):
        (tmp_path / f"{number}.txt").write_text(story)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.jsonl").write_bytes(lines([*STORIES[20:30], ""]))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(STORIES[30].encode()))
    np.save(tmp_path / "tokens.npy", np.arange(50))
    np.arange(60).astype("<u2").tofile(tmp_path / "tokens.bin")
    (tmp_path / "damaged.txt.gz").write_bytes(gzip.compress(STORIES[31].encode())[:-9])
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    (tmp_path / "other.png").write_bytes(b"\x89PNG\xff")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "empty.txt").touch()
    np.save(tmp_path / "floats.npy", np.zeros(3))
    corpus = read_corpus(str(tmp_path), 10**6)
    assert texts(corpus) == sorted(STORIES[:31])
    assert sorted(len(part) for part in (*corpus.train_tokens, *corpus.validation_tokens)) == [50, 60]
    said = sorted(remark.removeprefix(f"{tmp_path}: ") for remark in corpus.remarks)
    assert said == [
        "1 left out, JSON in one piece; .jsonl has a line for every document (list.json)",
        "1 left out, a damaged .gz from some place on (damaged.txt.gz)",
        "1 left out, expected one row of integers, got shape (3,) of float64 (floats.npy)",
        "1 left out, no text in its field (more/a.jsonl)",
        "1 left out, the file is empty (empty.txt)",
        "2 left out, not readable as UTF-8 text (other.png, picture.png)",
    ]


def test_what_was_beyond_the_budget_is_said(tmp_path):
    for number, story in enumerate(STORIES):
        (tmp_path / f"{number}.txt").write_text(story)
    corpus = read_corpus(str(tmp_path), 300)
    assert sum(len(document.text) for document in corpus.train) == 300
    counts = [int(remark.split(": ")[1].split()[0]) for remark in corpus.remarks if "--max-bytes" in remark]
    assert sum(counts) >= len(STORIES) - len(corpus.train) - len(corpus.validation)


def test_a_folder_below_a_hidden_one_is_read_and_hidden_files_in_it_are_not(tmp_path):
    folder = tmp_path / ".texts" / "here"
    folder.mkdir(parents=True)
    (folder / "a.txt").write_text(STORIES[0])
    (folder / ".hidden").write_text("no")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("no")
    assert "".join(document.text for document in (*read_corpus(str(folder), 10**6).train,)) in STORIES[0]
    assert "no" not in texts(read_corpus(str(folder.parent), 10**6))


@pytest.mark.parametrize("held_out", [True, False])
def test_the_only_good_file_of_a_folder_is_shared_and_that_is_said(tmp_path, held_out):
    name = next(f"{i}.txt" for i in range(100) if is_for_validation(f"{i}.txt") == held_out)
    (tmp_path / name).write_text("".join(STORIES))
    (tmp_path / "picture.png").write_bytes(b"\xff")
    corpus = read_corpus(str(tmp_path), 10**6)
    assert corpus.train[0].text + corpus.validation[0].text == "".join(STORIES)
    assert (
        f"{tmp_path}: {name} is all there is; its last tenth is for validation, the rest to train on" in corpus.remarks
    )


def test_a_folder_with_nothing_to_read_says_what_it_holds(tmp_path):
    (tmp_path / "picture.png").write_bytes(b"\xff")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"nothing to train on: 1 left out, .* 1 left out, ") as caught:
        read_corpus(str(tmp_path), 10**6)
    assert "\n" not in str(caught.value)


def test_a_damaged_npy_is_one_line(tmp_path):
    np.save(tmp_path / "t.npy", np.arange(100))
    whole = (tmp_path / "t.npy").read_bytes()
    for damaged in (
        whole[:4],
        whole[:40],
        whole[:200],
        b"\x93NUMPY\x01\x00v\x00{'descr': (" + whole[20:],
        b"PK\x03\x04",
    ):
        (tmp_path / "t.npy").write_bytes(damaged)
        with pytest.raises(ValueError, match="not a token file") as caught:
            read_corpus(str(tmp_path / "t.npy"), 10**6)
        assert "\n" not in str(caught.value)


def test_a_row_of_parquet_is_a_document(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": [*STORIES, None], "id": range(41)}), tmp_path / "a.parquet")
    corpus = read_corpus(str(tmp_path), 10**6)
    assert texts(corpus) == sorted(STORIES)
    assert corpus.remarks == (f"{tmp_path}: 1 left out, no text in its field (a.parquet)",)
    with pytest.raises(ValueError, match=r"a.parquet: expected a column 'body' \(--text-field\), got text, id"):
        read_corpus(str(tmp_path), 10**6, "body")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    assert any("a damaged .parquet (b.parquet)" in remark for remark in read_corpus(str(tmp_path), 10**6).remarks)


def test_a_saved_dataset_is_its_rows_and_its_splits_are_kept(tmp_path):
    datasets = pytest.importorskip("datasets")
    first = datasets.Dataset.from_dict({"text": STORIES[:30]})
    first.save_to_disk(tmp_path / "mixed" / "one")
    (tmp_path / "mixed" / "a.txt").write_text(STORIES[30])
    assert texts(read_corpus(str(tmp_path / "mixed"), 10**6)) == sorted(STORIES[:31])
    both = datasets.DatasetDict(train=first, test=datasets.Dataset.from_dict({"text": STORIES[30:]}))
    both.save_to_disk(tmp_path / "split")
    corpus = read_corpus(str(tmp_path / "split"), 10**6)
    assert [document.text for document in corpus.train] == STORIES[:30]
    assert [document.text for document in corpus.validation] == STORIES[30:]


def test_without_its_reader_a_table_is_refused_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"reading parquet needs pyarrow: pip install 'nsa\[datasets\]'"):
        read_corpus(str(tmp_path), 10**6)
    (tmp_path / "a.parquet").unlink()
    (tmp_path / "dataset_dict.json").write_text("{}")
    with pytest.raises(ValueError, match=r"saved dataset; reading it needs pip install 'nsa\[datasets\]'"):
        read_corpus(str(tmp_path), 10**6)
