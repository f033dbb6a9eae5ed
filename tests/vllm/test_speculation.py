"""Drafts, in the last of the files: they import numba, after which vLLM 0.32 makes no other engine in the process."""

from vllm_models import engine, expected, greedy, prompts, written

from nsa.serving import vllm_cache


def test_drafts_that_are_kept_and_drafts_that_are_not_change_nothing(folders, monkeypatch):
    """Also where steps in which all rows have as many drafts are those that a graph could hold."""
    monkeypatch.setattr(vllm_cache, "why_not_kernels", lambda *_: None)
    columns, real = [], vllm_cache.TablesBuilder._fixed
    monkeypatch.setattr(vllm_cache.TablesBuilder, "_fixed", lambda *given: columns.append(given[3]) or real(*given))
    drafts = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    given = prompts(5, 40, 300, 700, seed=4)
    found = greedy(engine(folders["nsa"], speculative_config=drafts), given, 40)
    assert written(found) == expected(folders["nsa"], given, 40)
    assert max(columns) > 1
