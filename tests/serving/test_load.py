"""Load is what it says: arrivals of a rate, and what is counted of answers."""

import math

import pytest

from nsa.serving.load import Answer, Load, percentile, summary


def test_arrivals_are_those_of_a_rate_and_a_seed():
    load = Load(4.0, 2000, 8, 2, (3, 9), seed=0)
    arrivals = load.arrivals()
    assert arrivals[0] == 0
    assert arrivals == sorted(arrivals) == load.arrivals()
    assert arrivals[-1] / 1999 == pytest.approx(1 / 4, rel=0.05)
    assert set(Load(0.0, 5, 8, 2, (3, 9), seed=0).arrivals()) == {0.0}
    prompts = load.prompts()
    assert {len(prompt) for prompt in prompts} == {8}
    assert {token for prompt in prompts for token in prompt} == set(range(3, 9))


def test_percentiles_are_values_that_were_there():
    assert [percentile([3.0, 1.0, 2.0], share) for share in (0.0, 0.5, 0.99, 1.0)] == [1.0, 2.0, 3.0, 3.0]
    assert percentile(list(range(1, 101)), 0.99) == 99
    assert math.isnan(percentile([], 0.5))


def test_a_summary_counts_whole_answers_only():
    answers = [Answer(0.0, [0.5, 0.75, 1.0]), Answer(1.0, [1.25, 2.0]), Answer(1.0, [], "400: no")]
    found = summary(answers, 2.0)
    assert found == {
        "requests": 3, "failed": 1, "seconds": 2.0, "requests_per_s": 1.0, "tokens_per_s": 2.5,
        "first_token_ms_median": 375.0, "first_token_ms_p99": 500.0,
        "between_tokens_ms_median": 250.0, "between_tokens_ms_p99": 750.0,
    }  # fmt: skip
