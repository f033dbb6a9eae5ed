"""Multi-value recall, continuation, recall at any distance, chat prompts, and what a model with phases is asked."""

import re
from types import SimpleNamespace

import pytest
import torch
from rigged import Rigged, Uniform
from transformers import LlamaConfig, LlamaForCausalLM

from nsa.eval.prompts import chat_frame
from nsa.eval.scoring import exact_match, wilson
from nsa.eval.tasks import Continuation, MultiValue, Needle, Perplexity, Recall
from nsa.training.tokenizer import byte_tokenizer


class Lister(Rigged):
    """Lists the values that were appended; knows the first `known` of them."""

    known = 99

    def next_token(self, said: str) -> int:
        name, begun = re.search(r"(\w+) ==? ?\[([^\[]*)$", said).groups()
        values = re.findall(rf"^{name}\.append\((\d+)\)$", said, re.MULTILINE)
        whole = ", ".join([*values[: self.known], *("0000" for _ in values[self.known :])])
        place = len(begun)
        return self.tokenizer(whole[place] if place < len(whole) else "]")["input_ids"][0]


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("length", [200, 331])
def test_multivalue_is_exact_in_length_and_place(text, tokenizer, length, chat):
    task = MultiValue(length=length, num_values=3, samples=5, text=text, chat=chat)
    assert task.prompts(tokenizer) == task.prompts(tokenizer)
    for prompt, spans in task.prompts(tokenizer):
        closing = len(tokenizer("]\n", add_special_tokens=False)["input_ids"])
        assert len(prompt.tokens) + len(prompt.answer) + closing == length
        said = tokenizer.decode(prompt.tokens)
        values = re.findall(r"^\w\w\.append\((\d+)\)$", said, re.MULTILINE)
        assert tokenizer.decode(prompt.answer) == ", ".join(values)
        assert [tokenizer.decode(prompt.answer[a:b]) for a, b in spans] == values
        assert tokenizer.decode(prompt.tokens[slice(*prompt.needle)]) == values[0]
        name = said.rsplit("[", 1)[0].split()[-2]
        question = tokenizer.decode(prompt.tokens[-prompt.question :])
        assert name in question
        assert "append" not in question or chat


def test_multivalue_counts_the_share_of_values(text):
    tokenizer, task = byte_tokenizer(), MultiValue(length=200, num_values=4, samples=4, text=text)
    for known in (4, 3, 0):
        model = Lister(tokenizer)
        model.known = known
        (row,) = task.run(model, tokenizer)
        assert (row.value, row.n, row.unit) == (known / 4, 4, "share of values")
        assert (row.low, row.high) == wilson(known, 4)  # four equal shares prove no more than that
    with pytest.raises(ValueError, match=r"a multivalue row of 20 tokens cannot hold 4 values: they take \d+"):
        MultiValue(length=20, text=text).run(Uniform(tokenizer), tokenizer)


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_chat_prompts_keep_their_length_their_needle_and_their_question(text, tokenizer, depth):
    plain, chat = (Needle(lengths=(240,), samples=3, text=text, chat=chat) for chat in (False, True))
    for one, two in zip(plain.prompts(tokenizer, 240, depth), chat.prompts(tokenizer, 240, depth), strict=True):
        assert len(one.tokens) == len(two.tokens)
        assert one.answer == two.answer
        assert two.tokens[slice(*two.needle)] == two.answer
        said = tokenizer.decode(two.tokens)
        (name,) = re.findall(r"What is the value of (\w+) above\?", said)
        assert said.startswith("[user] ")
        assert said.endswith(f" [end][assistant] {name}=")
        assert tokenizer.decode(two.tokens[-two.question :]).startswith("\nWhat is the value")
        assert tokenizer.decode(one.tokens[-one.question :]) == f"f({name}="


@pytest.mark.parametrize("chat", [False, True])
def test_recall_at_any_distance(text, tokenizer, chat):
    task = Recall(length=400, window_size=None, samples=20, hops=(1, 2), text=text, chat=chat)
    assert task.regions() == {"at any distance": (1, 400)}
    for hops in (1, 2):
        prompts = task.prompts(tokenizer, hops, "at any distance")
        distances = [prompt.distance for prompt in prompts]
        assert max(distances) - min(distances) > 100
        assert all(p.tokens[slice(*p.needle)] == p.answer for p in prompts)
        assert len({len(p.tokens) for p in prompts}) == 1


def test_a_template_that_is_not_there_or_hides_the_text_is_one_line():
    tokenizer = byte_tokenizer()
    with pytest.raises(ValueError, match="chat prompts need a tokenizer with a chat template; this one has none"):
        chat_frame(tokenizer, "?", "")
    tokenizer.chat_template = "nothing"
    with pytest.raises(ValueError, match="template does not show the user's message"):
        chat_frame(tokenizer, "?", "")


def test_continuation_is_the_end_of_perplexity(text):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=259, **sizes)).double().eval()
    tokenizer = byte_tokenizer()
    (row,) = Continuation(length=64, decode=32, samples=3, text=text).run(model, tokenizer)
    whole = Perplexity(length=64, samples=3, first_bucket=32, text=text).run(model, tokenizer)
    assert row.where["positions"] == [32, 64] == whole[2].where["positions"]
    assert row.values == pytest.approx(whole[2].values, rel=1e-12)
    with pytest.raises(ValueError, match="continuation: expected decode from 1 to 62, got 63"):
        Continuation(length=64, decode=63)


def test_a_model_with_phases_reads_question_and_answer_step_by_step(text):
    asked = []

    class Phases(Uniform):
        has_phases = True

        def forward(self, input_ids, use_cache, logits_to_keep, decode):
            asked.append((input_ids.shape[1], logits_to_keep, decode))
            return SimpleNamespace(logits=torch.zeros(len(input_ids), logits_to_keep, len(self.tokenizer)))

    tokenizer = byte_tokenizer()
    prompts = Needle(lengths=(128,), samples=2, text=text).prompts(tokenizer, 128, 0.5)
    exact_match(Phases(tokenizer), prompts)
    assert asked == [(128 - len(")\n") - 1, 4, len("f(AB=") + 4 - 1)]
    asked.clear()
    Continuation(length=64, decode=8, samples=2, text=text).run(Phases(tokenizer), tokenizer)
    Perplexity(length=64, samples=2, text=text).run(Phases(tokenizer), tokenizer)
    assert asked == [(63, 8, 8), (63, 63, 0)]
