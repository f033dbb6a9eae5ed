"""Puzzles as training rows: exact lengths, answers that the text holds, names that evaluation never uses."""

import random
import re

import numpy as np
import pytest

from nsa.training.curriculum import parse_stage
from nsa.training.data import TrainingBatches
from nsa.training.documents import Documents
from nsa.training.puzzles.chains import Chains
from nsa.training.puzzles.mix import DRAWS, LEAST_TOKENS, puzzle_row
from nsa.training.puzzles.puzzle import new_names
from nsa.training.puzzles.values import Keys
from nsa.training.puzzles.words import Common, Frequent
from nsa.training.retrieval import is_held_out
from nsa.training.tokenizer import encoder, train_bpe

FILLER = "".join(f"    total = buffer[{i}] + item * {i % 7}\n" for i in range(300))


def codes(text):
    return [ord(letter) for letter in text]


def letters(ids):
    return "".join(map(chr, ids))


@pytest.mark.parametrize("length", [LEAST_TOKENS, 300, 1000, 4096])
def test_rows_have_their_length_and_answers_that_stand_above_them(length):
    for seed in range(20):
        ids, answers = puzzle_row(random.Random(seed), FILLER, length, codes)
        assert len(ids) == length
        assert answers == sorted(answers)
        for begin, end in answers:
            assert re.fullmatch(r"\d{4}|[A-Z]+|[a-z]{6}", letters(ids[begin:end]))
            assert letters(ids[begin:end]) in letters(ids[:begin])
        assert (ids, answers) == puzzle_row(random.Random(seed), FILLER, length, codes)


def test_training_never_uses_evaluations_names():
    for seed in range(60):
        text = letters(puzzle_row(random.Random(seed), FILLER, 1000, codes)[0])
        found = re.findall(r"\b([A-Z]{2,})\b|^([a-z]{6})$", text.split("\n", 1)[1], re.MULTILINE)
        names = {first or second for first, second in found}
        assert not any(map(is_held_out, names))


def test_every_kind_occurs_with_any_tokenizer():
    encode = encoder(train_bpe([FILLER], 300))
    for encoding in (codes, encode):
        for draw in DRAWS:
            rng = random.Random(0)
            puzzle = draw(rng, 2048).make(rng, 2048, encoding, False)
            tokens = sum(len(encoding(part)) for part in (*puzzle.lines, puzzle.question, *puzzle.answers))
            assert tokens <= 2048
            if puzzle.together:
                assert tokens > 0.6 * 2048  # as many as fit


def test_common_words_are_more_common_and_frequent_ones_in_their_order():
    puzzle = Common(common=3, often=8, seldom=2).make(random.Random(1), 1000, codes, False)
    assert {puzzle.lines.count(line) for line in puzzle.lines} == {8, 2}
    assert [puzzle.lines.count(f"{word}\n") for word in puzzle.answers] == [8, 8, 8]
    places = [puzzle.lines.index(f"{word}\n") for word in puzzle.answers]
    assert places == sorted(places)
    puzzle = Frequent(asked=3).make(random.Random(1), 1000, codes, False)
    counts = sorted((puzzle.lines.count(line) for line in set(puzzle.lines)), reverse=True)
    assert [puzzle.lines.count(f"{word}\n") for word in puzzle.answers] == counts[:3]
    assert counts[0] > counts[1] > counts[2] > counts[3]


def test_chains_lead_from_the_value_through_every_name():
    puzzle = Chains(hops=4, chains=3).make(random.Random(2), 1000, codes, False)
    pairs = dict(line.strip().split("=") for line in puzzle.lines)
    value = puzzle.question.split()[1]
    assert len(pairs) == len(puzzle.lines) == 15
    assert [pairs[name] for name in puzzle.answers] == [value, *puzzle.answers[:-1]]
    lines = [puzzle.lines.index(f"{name}={pairs[name]}\n") for name in puzzle.answers]
    assert lines == sorted(lines)  # nothing is used before it is there


def test_there_are_names_for_every_row_however_long():
    names = new_names(random.Random(0), 9000, held_out=True)
    assert len(set(names)) == 9000
    assert all(map(is_held_out, names))
    assert len(Keys(keys=0).make(random.Random(0), 60_000, codes, True).lines) > 5000


def test_the_curriculum_mixes_puzzles_in_and_weighs_their_answers():
    stage = parse_stage("512x4:repeated=0.25:puzzles=0.75")
    assert str(stage) == "512x4:repeated=0.25:puzzles=0.75"
    documents = Documents(np.zeros(2000, np.int64), [0])
    batches = TrainingBatches(documents, [stage], 4096, encode=codes, filler=FILLER, seed=0, answer_weight=3.0)
    batch = batches[0]
    heavy = (batch["weights"] == batch["weights"].max()).any(dim=1)
    assert batch["input_ids"].shape == (8, 512)
    assert 0 < heavy.sum() < 8
    row = int(heavy.nonzero()[0, 0])
    answer = letters(batch["input_ids"][row][batch["weights"][row] == batch["weights"].max()].tolist())
    assert re.fullmatch(r"[A-Za-z0-9]+", answer)


def test_rows_too_short_for_puzzles_are_refused_when_the_curriculum_is_read():
    with pytest.raises(ValueError, match=r"'64x10:puzzles=0.5': rows of puzzles have at least 128 tokens"):
        parse_stage("64x10:puzzles=0.5")
    with pytest.raises(ValueError, match="a row of puzzles needs 128 tokens, got 64"):
        puzzle_row(random.Random(0), FILLER, 64, codes)
    with pytest.raises(ValueError, match="shares add up to at most 1"):
        parse_stage("512x10:retrieval=0.5:puzzles=0.6")
