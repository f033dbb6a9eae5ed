"""Retrieval examples: answers are where they are said to be, unique, and at the distance asked for."""

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa.training.retrieval import Retrieval, is_held_out, repeated_example, retrieval_example
from nsa.training.tokenizer import byte_tokenizer, encoder, train_bpe

FILLER = "".join(f"def step_{i}(state):\n    return state + {i}  # à côté\n\n" for i in range(400))


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request):
    return byte_tokenizer() if request.param == "bytes" else train_bpe([FILLER], 300)


def example(seed, length, *, tokenizer=None, distance=None, depth=None, **asked):
    encode = encoder(tokenizer or byte_tokenizer())
    asked = Retrieval(**asked)
    return retrieval_example(random.Random(seed), FILLER, length, encode, asked, distance=distance, depth=depth)


def spelled(ids, tokenizer=None):
    return (tokenizer or byte_tokenizer()).decode(list(ids))


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**9), length=st.integers(60, 700), hops=st.integers(1, 3), held_out=st.booleans())
def test_answers_are_where_the_spans_say_and_their_names_are_defined_once(tokenizer, seed, length, hops, held_out):
    row = example(seed, length, num_hops=hops, held_out=held_out, tokenizer=tokenizer)
    assert len(row.ids) == length
    assert row.answers
    text = spelled(row.ids, tokenizer)
    for answer in row.answers:
        assert spelled(row.ids[answer.start : answer.end], tokenizer) == answer.value
        defined = row.ids[answer.start - answer.distance : answer.end - answer.distance]
        assert spelled(defined, tokenizer) == answer.value
        assert len(re.findall(rf"^{answer.name}=", text, re.MULTILINE)) == 1
        assert len(re.findall(rf"f\({answer.name}=", text)) == 1
        assert is_held_out(answer.name) == held_out
    assert len({answer.name for answer in row.answers}) == len(row.answers)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**9), distance=st.integers(60, 400), keys=st.integers(1, 5))
def test_the_first_question_is_at_the_distance_asked_for(tokenizer, seed, distance, keys):
    row = example(seed, 512, num_keys=keys, num_questions=1, distance=distance, tokenizer=tokenizer)
    assert [answer.distance for answer in row.answers] == [distance]


def test_depth_0_begins_with_the_definitions_and_depth_1_ends_with_them_before_the_question():
    first, last = (example(1, 300, num_keys=1, depth=depth) for depth in (0.0, 1.0))
    (answer,) = first.answers
    assert spelled(first.ids).startswith(f"{answer.name}={answer.value}\n")
    (answer,) = last.answers
    assert spelled(last.ids).endswith(f"{answer.name}={answer.value}\nf({answer.name}={answer.value})\n")


def test_a_row_in_eight_begins_with_a_definition():
    rows = [example(seed, 600, num_keys=2) for seed in range(400)]
    firsts = sum(spelled(row.ids).startswith(tuple(f"{answer.name}=" for answer in row.answers)) for row in rows)
    # Binomial(400, 1/8) leaves [25, 78] once in ten thousand
    assert 25 <= firsts <= 78


def test_an_example_is_a_function_of_its_seed():
    assert example(3, 256) == example(3, 256)
    assert example(3, 256) != example(4, 256)


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
        ({"num_keys": 33}, "33 keys need longer names than 2 letters"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(options, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        example(0, 200, **options)
    assert "\n" not in str(caught.value)
