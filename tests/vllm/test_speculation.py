"""Drafts, in the last of the files: they import numba, after which vLLM 0.32 makes no other engine in the process."""

from vllm_models import engine, expected, greedy, prompts, written


def test_drafts_that_are_kept_and_drafts_that_are_not_change_nothing(folders):
    drafts = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    given = prompts(5, 40, 300, 700, seed=4)
    found = greedy(engine(folders["nsa"], speculative_config=drafts), given, 40)
    assert written(found) == expected(folders["nsa"], given, 40)
