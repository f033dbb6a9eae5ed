"""Tasks against models whose scores are known, and against direct computations."""

import statistics

import pytest
import torch
from rigged import Lookup, Picker, Uniform
from transformers import LlamaConfig, LlamaForCausalLM

from nsa.eval.tasks import PUZZLES, TASKS, Needle, Perplexity, Recall
from nsa.eval.tasks.recall import BEYOND, INSIDE, OUT_OF_REACH
from nsa.models import NSALlamaConfig, NSALlamaForCausalLM
from nsa.training.tokenizer import byte_tokenizer

SIZES = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2,
         "num_key_value_heads": 1, "bos_token_id": None, "eos_token_id": None}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def small_tasks(text):
    return {
        "needle": Needle(lengths=(96, 160), depths=(0.0, 0.5, 1.0), samples=4, text=text),
        "recall": Recall(length=256, window_size=64, num_layers=2, samples=6, text=text),
        "perplexity": Perplexity(length=96, samples=5, first_bucket=16, text=text),
    }


def test_a_model_that_looks_everything_up_scores_one(text, tokenizer):
    for name in ("needle", "recall"):
        rows = small_tasks(text)[name].run(Lookup(tokenizer), tokenizer)
        assert rows
        assert all(row.value == 1.0 and row.high == 1.0 and row.correct == row.n for row in rows)


def test_a_model_that_knows_nothing_scores_chance(text, tokenizer):
    for name in ("needle", "recall"):
        for row in small_tasks(text)[name].run(Uniform(tokenizer), tokenizer):
            assert row.value == 0.0
            assert row.low <= row.chance <= row.high


def test_a_model_that_picks_any_value_scores_one_in_the_number_of_keys(text, tokenizer):
    task = Recall(length=256, window_size=64, num_layers=2, num_keys=4, hops=(1,), samples=100, text=text)
    rows = task.run(Picker(tokenizer), tokenizer)
    correct, n = sum(row.correct for row in rows), sum(row.n for row in rows)
    assert n == 300
    assert abs(correct / n - 1 / 4) < 3 * (0.25 * 0.75 / n) ** 0.5


def test_progress_reaches_the_number_announced(text, tokenizer):
    for task in small_tasks(text).values():
        done = []
        task.run(Uniform(tokenizer), tokenizer, done.append)
        assert sum(done) == task.num_steps(tokenizer)


def test_every_model_gets_the_same_prompts(text, tokenizer):
    needle, recall = (small_tasks(text)[name] for name in ("needle", "recall"))
    assert needle.prompts(tokenizer, 96, 0.5) == needle.prompts(tokenizer, 96, 0.5)
    assert recall.prompts(tokenizer, 2, BEYOND) == recall.prompts(tokenizer, 2, BEYOND)
    assert len({tuple(prompt.tokens) for prompt in needle.prompts(tokenizer, 96, 0.5)}) == needle.samples


@pytest.mark.parametrize("hops", [1, 2, 3])
def test_recall_lies_in_its_region(text, tokenizer, hops):
    task = Recall(length=400, window_size=80, num_layers=3, hops=(hops,), samples=20, text=text)
    assert task.regions() == {INSIDE: (1, 80), BEYOND: (81, 238), OUT_OF_REACH: (239, 400)}
    for region, (low, high) in task.regions().items():
        assert all(low <= prompt.distance <= high for prompt in task.prompts(tokenizer, hops, region))


def test_regions_are_what_window_only_layers_can_reach():
    """The gradient of the answer's logits by the inputs of a window twin ends exactly where the region does."""
    window_size, num_layers, length = 5, 3, 32
    config = NSALlamaConfig(**SIZES, num_hidden_layers=num_layers, attention="window", nsa={"window_size": window_size})
    torch.manual_seed(0)
    model = NSALlamaForCausalLM(config)
    embeddings = torch.randn(1, length, 32, requires_grad=True)
    model(inputs_embeds=embeddings).logits[0, -1].square().sum().backward()
    seen = embeddings.grad[0].abs().sum(-1) > 0
    reachable = [length - position for position in range(length) if seen[position]]  # of an answer at `length`
    regions = Recall(length=length, window_size=window_size, num_layers=num_layers).regions()
    assert max(reachable) == regions[BEYOND][1]
    assert regions[OUT_OF_REACH][0] == max(reachable) + 1


def test_perplexity_by_position_is_the_direct_mean(text, tokenizer):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=1)).double().eval()
    task = Perplexity(length=96, samples=5, first_bucket=16, text=text)
    rows = task.run(model, tokenizer)
    tokens = task.sequences(tokenizer)
    with torch.no_grad():
        log_p = model(tokens).logits.log_softmax(-1)
    assert [row.where["positions"] for row in rows] == ["all", [1, 16], [16, 32], [32, 64], [64, 96]]
    for row in rows:
        first, last = (1, 96) if row.where["positions"] == "all" else row.where["positions"]
        each = [
            sum(-log_p[s, i - 1, tokens[s, i]].item() for i in range(first, last)) / (last - first) for s in range(5)
        ]
        assert row.value == pytest.approx(sum(each) / 5, rel=1e-10)
        assert row.values == pytest.approx(each, rel=1e-10)
        assert row.error == pytest.approx(statistics.stdev(each) / 5**0.5, rel=1e-10)


def test_perplexity_of_the_uniform_model_is_the_vocabulary(text, tokenizer):
    rows = Perplexity(length=64, samples=3, text=text).run(Uniform(tokenizer), tokenizer)
    assert all(row.value == pytest.approx(torch.tensor(259.0).log().item()) for row in rows)


def test_sequences_of_perplexity_lie_inside_documents(text, tokenizer):
    from nsa.eval.text import held_out_texts

    for sequence in Perplexity(length=96, samples=9, text=text).sequences(tokenizer):
        assert any(tokenizer.decode(sequence) in document for document in held_out_texts(text))


def test_tasks_are_found_by_name():
    assert all(task.name == name for name, task in TASKS.items())
    assert list(TASKS) == ["needle", "recall", "perplexity", "multivalue", "continuation", *PUZZLES]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Needle(lengths=()), "needle: lengths must be positive token counts, got []"),
        (lambda: Needle(depths=(0.5, 1.5)), "needle: depths must lie between 0 and 1, got [0.5, 1.5]"),
        (lambda: Needle(samples=0), "needle: samples must be positive, got 0"),
        (lambda: Recall(window_size=0), "recall: window_size must be positive, got 0"),
        (lambda: Recall(hops=(0,)), "recall: hops must be positive, got [0]"),
        (lambda: Perplexity(length=1), "perplexity: length must be at least 2 tokens, got 1"),
    ],
)
def test_impossible_parameters_are_one_clear_line(make, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        make()
    assert str(caught.value) == message


def test_rows_too_short_for_their_needle_say_both_sizes(text, tokenizer):
    with pytest.raises(ValueError, match=r"a retrieval row of 12 tokens cannot hold 1 keys .* they take \d+"):
        Needle(lengths=(12,), text=text).run(Uniform(tokenizer), tokenizer)


def test_text_too_short_for_the_sequences_says_how_many_it_holds(text, tokenizer):
    with pytest.raises(ValueError, match=r"8 sequences of 9000 tokens, each inside one document; the text holds 2"):
        Perplexity(length=9000, samples=8, text=text).run(Uniform(tokenizer), tokenizer)


def test_a_missing_text_is_one_clear_line(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"no such text: .*nothing"):
        Needle(text=str(tmp_path / "nothing")).run(Uniform(tokenizer), tokenizer)
