"""vLLM writes the tokens that generate() writes, whatever it does with requests and blocks."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm_models import CONTEXT, engine, expected, greedy, pool, prompts, save, written

from nsa.testing import assert_close_to_fp64


@pytest.fixture(scope="module")
def llm(folders):
    return engine(folders["nsa"], max_num_batched_tokens=512)


@pytest.fixture(scope="module")
def tight(folders):
    """Chunks of 48 tokens, and blocks for few of the requests at a time."""
    return engine(
        folders["nsa"], max_num_batched_tokens=48, max_num_seqs=8, max_model_len=1024, num_gpu_blocks_override=12
    )  # fmt: skip


def test_rows_of_mixed_lengths_write_what_generate_writes(llm, folders):
    given = prompts(1, 5, 31, 32, 255, 256, 300, 900)
    assert written(greedy(llm, given, 20)) == expected(folders["nsa"], given, 20)


def test_a_prefix_hit_equals_cold(llm, folders):
    (common,) = prompts(700, seed=11)
    tails = prompts(3, 150, 40, seed=12)
    given = [common + tail for tail in tails]
    found = [greedy(llm, [prompt], 12)[0] for prompt in given]
    assert [one.num_cached_tokens for one in found] == [0, 512, 512]
    assert written(found) == expected(folders["nsa"], given, 12)


def test_chunks_and_preemption_change_nothing(tight, folders, monkeypatch):
    given, preempted = prompts(250, 245, 500, 252, 90, 248, seed=5), []
    scheduler = tight.llm_engine.engine_core.engine_core.scheduler
    real = scheduler._preempt_request

    def preempt(request, *args, **kwargs):
        preempted.append(request)
        real(request, *args, **kwargs)

    monkeypatch.setattr(scheduler, "_preempt_request", preempt)
    found = greedy(tight, given, 24)
    assert written(found) == expected(folders["nsa"], given, 24)
    assert preempted
    assert pool(tight).get_num_free_blocks() == 11  # all but the null block


def test_a_batch_of_64(llm, folders):
    given = prompts(*(3 + 7 * i % 90 for i in range(64)), seed=6)
    assert written(greedy(llm, given, 6)) == expected(folders["nsa"], given, 6)


def test_aborted_requests_leave_all_blocks_free(llm):
    from vllm import SamplingParams

    free = pool(llm).num_gpu_blocks - 1
    for round_ in range(3):
        for number, prompt in enumerate(prompts(300, 40, 600, 5, seed=20 + round_)):
            llm.llm_engine.add_request(
                f"{round_}-{number}", {"prompt_token_ids": prompt},
                SamplingParams(temperature=0, max_tokens=50, ignore_eos=True, detokenize=False),
            )  # fmt: skip
        for _ in range(1 + 2 * round_):
            llm.llm_engine.step()
        llm.llm_engine.abort_request([f"{round_}-{number}" for number in range(4)], internal=False)
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
        llm.llm_engine.step()
        assert pool(llm).get_num_free_blocks() == free


def test_logprobs_are_the_model_s(llm, folders):
    from vllm import SamplingParams

    (given,) = prompts(300, seed=9)
    parameters = SamplingParams(temperature=0, max_tokens=6, logprobs=4, ignore_eos=True, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": given}], parameters, use_tqdm=False)
    (choice,) = output.outputs
    ids = torch.tensor([[*given, *choice.token_ids]])
    model = AutoModelForCausalLM.from_pretrained(folders["nsa"])
    with torch.no_grad():
        plain, truth = (model.to(dtype)(ids).logits[0, len(given) - 1 : -1] for dtype in (torch.float32, torch.float64))
    chosen = truth.topk(4).indices
    assert [list(found) for found in choice.logprobs] == chosen.tolist()
    actual = torch.tensor([[one.logprob for one in found.values()] for found in choice.logprobs])
    plain, logprobs = (x.log_softmax(-1).gather(1, chosen) for x in (plain, truth))
    assert_close_to_fp64(actual, plain, logprobs, largest_score=float(truth.abs().max()))


def test_samples_follow_their_seeds(llm):
    from vllm import SamplingParams

    def drawn(**options) -> list[list[int]]:
        parameters = SamplingParams(max_tokens=10, ignore_eos=True, detokenize=False, **options)
        return written(llm.generate([{"prompt_token_ids": x} for x in given], parameters, use_tqdm=False))

    given = prompts(20, 280, seed=10)
    first = drawn(temperature=2.0, top_p=0.95, seed=1)
    assert first == drawn(temperature=2.0, top_p=0.95, seed=1)
    assert first != drawn(temperature=2.0, top_p=0.95, seed=2)
    assert drawn(temperature=2.0, top_k=1) == written(greedy(llm, given, 10))


@pytest.mark.parametrize("attention", ["dense", "window"])
def test_the_twins_write_what_generate_writes(attention, folders):
    given = prompts(5, 40, 300)
    assert written(greedy(engine(folders[attention]), given, 12)) == expected(folders[attention], given, 12)


VARIANTS = {
    "shared": {
        "nsa": {"shared_kv": True, "compression": "linear"}, "attention_bias": True, "tie_word_embeddings": True,
    },
    "odd": {
        "nsa": {"compression": "mean", "compress_block_size": 16, "select_block_size": 32, "window_size": 7},
        "head_dim": 8, "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0},
    },
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_kinds_of_nsa_models(variant, tmp_path):
    folder, given = save(tmp_path / variant, "nsa", **VARIANTS[variant]), prompts(6, 40, 290)
    assert written(greedy(engine(folder), given, 12)) == expected(folder, given, 12)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"block_size": 96}, r"block size: expected a multiple of select_block_size=64 \(l'\), got 96"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype: the caches have the model's, expected 'auto', got 'fp8'"),
        ({"max_model_len": 2 * CONTEXT}, "max_model_len"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_refused(options, said, folders):
    with pytest.raises(ValueError, match=said):
        engine(folders["nsa"], **options)
