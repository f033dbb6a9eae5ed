"""Requests that come at random and leave at random take no block with them: `--requests 10000` for the whole run."""

import random

import pytest
from vllm_models import engine, expected, pool, prompts

NEW = 12


@pytest.fixture(scope="module")
def crowded(folders):
    """Blocks for a few of the requests that run at a time, so that some are preempted too."""
    return engine(
        folders["nsa"], max_num_batched_tokens=256, max_num_seqs=32, max_model_len=1024, num_gpu_blocks_override=60
    )  # fmt: skip


def test_no_block_is_lost_and_who_stays_has_its_tokens(crowded, folders, request):
    from vllm import SamplingParams

    draw, core, scheduler = random.Random(0), crowded.llm_engine, pool(crowded)
    total = scheduler.num_gpu_blocks - 1  # all but the null block
    texts = prompts(*(draw.choice((3, 9, 30, 70, 255, 256, 300)) for _ in range(24)), seed=31)
    truth = expected(folders["nsa"], texts, NEW)
    left = requests = request.config.getoption("--requests")
    running, aborted, finished, most = {}, 0, 0, 0
    while left or core.has_unfinished_requests():
        while left and len(running) < 48 and draw.random() < 0.9:
            left -= 1
            number, count = draw.randrange(len(texts)), draw.randint(1, NEW)
            running[str(left)] = (number, count)
            parameters = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
            core.add_request(str(left), {"prompt_token_ids": texts[number]}, parameters)
        for output in core.step():
            if output.finished:
                number, count = running.pop(output.request_id)
                assert list(output.outputs[0].token_ids) == truth[number][:count]
                finished += 1
        gone = [name for name in running if draw.random() < 0.03]
        if gone:
            core.abort_request(gone, internal=False)
            aborted += len(gone)
            for name in gone:
                del running[name]
        most = max(most, total - scheduler.get_num_free_blocks())
    core.step()
    print(f"{requests} requests: {finished} answered, {aborted} aborted, at most {most} of {total} blocks in use")
    assert finished + aborted == requests
    assert min(finished, aborted) > requests // 20
    assert scheduler.get_num_free_blocks() == total
