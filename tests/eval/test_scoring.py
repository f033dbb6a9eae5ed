"""Exact match against generation and rigged models; intervals against their definitions."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nsa.eval import scoring
from nsa.eval.prompts import Prompt
from nsa.eval.scoring import exact_match, mean_and_error, token_losses, wilson


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=7, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, bos_token_id=None, eos_token_id=None, initializer_range=1.0,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def test_exact_match_is_what_greedy_generation_would_print(llama, monkeypatch):
    """Prompts of several lengths, half with the true continuation as the answer, half with one token of it changed."""
    monkeypatch.setattr(scoring, "TOKENS_PER_BATCH", 64)
    generator = torch.Generator().manual_seed(1)
    prompts, expected = [], []
    for index in range(24):
        tokens = torch.randint(7, (1, 8 + index % 3), generator=generator)
        answer = llama.generate(tokens, max_new_tokens=4, do_sample=False)[0, tokens.shape[1] :].tolist()
        if index % 2:
            answer[index % 4] = (answer[index % 4] + 1) % 7
        prompts.append(Prompt(tokens[0].tolist(), answer, (0, 1)))
        expected.append(index % 2 == 0)
    finished = []
    assert exact_match(llama, prompts, finished.append) == expected
    assert sum(finished) == 24


def test_no_prompts_give_no_answers(llama):
    assert exact_match(llama, []) == []


def test_token_losses_are_minus_the_log_probabilities(llama):
    tokens = torch.randint(7, (2, 9))
    with torch.no_grad():
        p = llama(tokens).logits.softmax(-1)
    for row in range(2):
        for i in range(8):
            expected = -math.log(p[row, i, tokens[row, i + 1]].item())
            assert token_losses(llama, tokens)[row, i].item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("correct", "n"), [(0, 10), (1, 10), (5, 10), (97, 100), (100, 100), (1, 1)])
def test_wilson_ends_are_where_the_score_test_rejects(correct, n):
    """The definition: at the ends p of the interval |share - p| = z * sqrt(p * (1 - p) / n)."""
    low, high = wilson(correct, n)
    share = correct / n
    assert 0 <= low <= share <= high <= 1
    for p in (low, high):
        if 0 < p < 1:
            assert abs(share - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / n), rel=1e-6)
    assert (low == 0) == (correct == 0)
    assert (high == 1) == (correct == n)


def test_wilson_of_nothing_says_nothing():
    assert wilson(0, 0) == (0.0, 1.0)


def test_mean_and_error_of_known_values():
    mean, error = mean_and_error([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5
    assert error == pytest.approx(math.sqrt((5 / 3) / 4))
    assert math.isnan(mean_and_error([1.0])[1])
    assert math.isnan(mean_and_error([])[0])
