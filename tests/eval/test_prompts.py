"""Prompts: exact lengths and places, for any tokenizer, and the same every time."""

import pytest

from nsa.eval.prompts import planted
from nsa.eval.text import held_out_text
from nsa.training.retrieval import is_held_out
from nsa.training.tokenizer import byte_tokenizer, train_bpe

CLOSING = ")\n"


@pytest.fixture(scope="module")
def filler(text):
    return held_out_text(text)


@pytest.fixture(params=["bytes", "words"])
def tokenizer(request, filler):
    return byte_tokenizer() if request.param == "bytes" else train_bpe([filler], 400)


def length_of(prompt, tokenizer):
    return len(prompt.tokens) + len(prompt.answer) + len(tokenizer(CLOSING)["input_ids"])


@pytest.mark.parametrize("length", [100, 257, 1024])
@pytest.mark.parametrize("depth", [0.0, 0.33, 1.0])
def test_a_prompt_is_exactly_as_long_as_asked_for(tokenizer, filler, length, depth):
    prompt = planted("seed", filler, tokenizer, length, depth=depth)
    assert length_of(prompt, tokenizer) == length


def test_the_needle_is_the_answer(tokenizer, filler):
    prompt = planted("seed", filler, tokenizer, 300, depth=0.5)
    first, last = prompt.needle
    assert prompt.tokens[first:last] == prompt.answer
    text = tokenizer.decode(prompt.tokens)
    name = text.rsplit("f(", 1)[1].split("=")[0]
    assert f"{name}={tokenizer.decode(prompt.answer)}\n" in text
    assert text.endswith(f"f({name}=")
    assert is_held_out(name)


def test_depth_goes_from_the_start_to_right_before_the_question(tokenizer, filler):
    prompts = [planted("seed", filler, tokenizer, 600, depth=depth) for depth in (0.0, 0.25, 0.5, 0.75, 1.0)]
    starts = [prompt.needle[0] for prompt in prompts]
    assert starts == sorted(set(starts))
    assert "\n" not in tokenizer.decode(prompts[0].tokens[: starts[0]])  # no filler before the first
    assert tokenizer.decode(prompts[-1].tokens[prompts[-1].needle[1] :]).count("\n") == 1  # and none after the last


@pytest.mark.parametrize("distance", [60, 100, 333])
def test_a_distance_is_met_exactly(tokenizer, filler, distance):
    prompt = planted("seed", filler, tokenizer, 600, distance=distance)
    assert prompt.distance == distance


def test_the_seed_decides_the_prompt(tokenizer, filler):
    one, same, other = (planted(seed, filler, tokenizer, 300, depth=0.5) for seed in ("a", "a", "b"))
    assert one == same
    assert one.tokens != other.tokens
