"""Retrieval examples: answers are where they are said to be, unique, and at the distance asked for."""

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa.training.retrieval import is_held_out, repeated_example, retrieval_example
from nsa.training.tokenizer import byte_tokenizer, encoder, train_bpe

FILLER = "".join(f"def step_{i}(state):\n    return state + {i}  # à côté\n\n" for i in range(400))


def spelled(tokenizer, ids):
    return "".join(map(chr, ids)) if tokenizer is None else tokenizer.decode(list(ids))


@pytest.fixture(scope="module", params=["letters", "bytes", "bpe"])
def tokenizer(request):
    makers = {"letters": lambda: None, "bytes": byte_tokenizer, "bpe": lambda: train_bpe([FILLER], 300)}
    return makers[request.param]()


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**9), length=st.integers(60, 700), hops=st.integers(1, 3), held_out=st.booleans())
def test_answers_are_where_the_spans_say_and_their_names_are_defined_once(tokenizer, seed, length, hops, held_out):
    encode = None if tokenizer is None else encoder(tokenizer)
    example = retrieval_example(random.Random(seed), FILLER, length, num_hops=hops, held_out=held_out, tokenizer=encode)
    assert len(example.ids) == length
    assert example.answers
    for answer in example.answers:
        assert spelled(tokenizer, example.ids[answer.start : answer.end]) == answer.value
        defined = example.ids[answer.start - answer.distance : answer.end - answer.distance]
        assert spelled(tokenizer, defined) == answer.value
        assert len(re.findall(rf"^{answer.name}=", example.text, re.MULTILINE)) == 1
        assert len(re.findall(rf"f\({answer.name}=", example.text)) == 1
        assert is_held_out(answer.name) == held_out
    assert len({answer.name for answer in example.answers}) == len(example.answers)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**9), distance=st.integers(60, 400), keys=st.integers(1, 5))
def test_the_first_question_is_at_the_distance_asked_for(tokenizer, seed, distance, keys):
    encode = None if tokenizer is None else encoder(tokenizer)
    example = retrieval_example(
        random.Random(seed), FILLER, 512, num_keys=keys, num_questions=1, distance=distance, tokenizer=encode
    )
    assert [answer.distance for answer in example.answers] == [distance]


def test_depth_0_begins_with_the_definitions_and_depth_1_ends_with_them_before_the_question():
    first = retrieval_example(random.Random(1), FILLER, 300, num_keys=1, depth=0.0)
    last = retrieval_example(random.Random(1), FILLER, 300, num_keys=1, depth=1.0)
    (answer,) = first.answers
    assert first.text.startswith(f"{answer.name}={answer.value}\n")
    (answer,) = last.answers
    assert last.text.endswith(f"{answer.name}={answer.value}\nf({answer.name}={answer.value})\n")


def test_a_row_in_eight_begins_with_a_definition():
    rows = [retrieval_example(random.Random(seed), FILLER, 600, num_keys=2) for seed in range(400)]
    firsts = sum(row.text.index(min((f"{a.name}=" for a in row.answers), key=row.text.index)) == 0 for row in rows)
    # Binomial(400, 1/8) leaves [25, 78] once in ten thousand
    assert 25 <= firsts <= 78


def test_without_a_tokenizer_the_ids_spell_the_text():
    example = retrieval_example(random.Random(2), FILLER, 400)
    assert "".join(map(chr, example.ids)) == example.text


def test_an_example_is_a_function_of_its_seed():
    assert retrieval_example(random.Random(3), FILLER, 256) == retrieval_example(random.Random(3), FILLER, 256)
    assert retrieval_example(random.Random(3), FILLER, 256) != retrieval_example(random.Random(4), FILLER, 256)


@given(seed=st.integers(0, 10**9), length=st.integers(8, 200))
def test_a_repeated_example_repeats_one_word_to_its_end(seed, length):
    text = repeated_example(random.Random(seed), length)
    assert len(text) == length
    assert any(text[period:] == text[:-period] for period in range(3, length))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_keys": 30}, "cannot hold 30 keys with 30 questions: they take 570"),
        ({"num_keys": 1, "distance": 4000}, "distance 4000 is out of reach"),
        ({"num_keys": 1, "depth": 1.5}, "depth in [0, 1]"),
        ({"num_hops": 0}, "num_hops must be at least 1, got 0"),
        ({"num_keys": 3, "name_length": 1, "held_out": True}, "need longer names than 1 letters"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(options, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        retrieval_example(random.Random(0), FILLER, 200, **options)
    assert "\n" not in str(caught.value)
