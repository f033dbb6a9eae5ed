"""Prompt lookup and assistants that try more tokens than a cache takes back by default."""

import warnings

import pytest
import torch
from tiny_llama import model, tokens

from nsa.models import NSALlamaCache, generation


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own notes on its assistant's settings
        yield


def repeating_prompt():
    """What prompt lookup finds long candidates in, that are soon wrong."""
    return tokens(1, 90).repeat(1, 2)


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("count", [70, 150])
def test_prompt_lookup_tries_as_many_tokens_as_it_is_told(on_gpu, count, request):
    if on_gpu:
        request.getfixturevalue("graphs_without_capture")
    built, ids = model(), repeating_prompt()
    plain = built.generate(ids, max_new_tokens=8, do_sample=False, cuda_graphs=False)
    widths = []
    built.model.embed_tokens.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    looked_up = built.generate(ids, prompt_lookup_num_tokens=count, max_new_tokens=8, do_sample=False)
    assert torch.equal(looked_up, plain)
    assert widths[0] == 180 + min(count, 90)


def test_an_assistant_tries_as_many_tokens_as_it_is_told():
    built, assistant, ids = model(), model(num_hidden_layers=1), tokens(1, 30)
    assistant.generation_config.num_assistant_tokens = 70
    assistant.generation_config.assistant_confidence_threshold = 0.0
    out = built.generate(
        ids, assistant_model=assistant, max_new_tokens=100, do_sample=False,
        stopping_criteria=[lambda known, scores: torch.tensor([known.shape[1] >= 33])],
    )  # fmt: skip
    assert torch.equal(out[:, :33], built.generate(ids, max_new_tokens=3, do_sample=False))


def test_a_model_that_leaves_early_is_its_own_assistant():
    built, ids = model(), tokens(1, 30)
    out = built.generate(ids, assistant_early_exit=1, max_new_tokens=8, do_sample=False)
    assert torch.equal(out, built.generate(ids, max_new_tokens=8, do_sample=False))


def test_a_given_cache_that_takes_back_fewer_is_one_line_before_anything_is_fed():
    built, ids = model(), tokens(1, 30)
    cache = NSALlamaCache(built.config, max_crop=8)
    line = r"^past_key_values: max_crop=8 tokens can be taken back, expected at least 12 for as many candidates$"
    with pytest.raises(ValueError, match=line):
        built.generate(ids, prompt_lookup_num_tokens=10, past_key_values=cache, max_new_tokens=4)
    assert cache.get_seq_length() == 0


def test_candidates_need_tokens_to_look_at():
    built = model()
    embeds = built.get_input_embeddings()(tokens(1, 30))
    with pytest.raises(ValueError, match=r"^generate\(\): candidates .* need input_ids, got inputs_embeds$"):
        built.generate(inputs_embeds=embeds, prompt_lookup_num_tokens=4, max_new_tokens=4)


def test_no_schedule_makes_more_candidates_than_the_cache_is_made_for():
    """The heuristic's numbers, from n: two more after a step that was all right, one fewer after another."""
    for start in (1, 5, 20):
        for new in (1, 7, 60):
            built, assistant = model(), model(num_hidden_layers=1)
            assistant.generation_config.num_assistant_tokens = start
            assistant.generation_config.num_assistant_tokens_schedule = "heuristic"
            settings = built.generation_config.from_dict({"max_new_tokens": new})
            most = generation.most_candidates(built, settings, {"assistant_model": assistant})
            seen = {(start, 0)}
            while seen:
                assert all(count <= most for count, _ in seen)
                right = {(count + 2, made + count + 1) for count, made in seen}
                wrong = {(max(1, count - 1), made + 1) for count, made in seen}
                seen = {state for state in right | wrong if state[1] < new}
