"""InfLLM-V2 over block tables is the function over whole sequences, however their tokens come."""

from functools import partial

import torch

from nsa.config import InfLLMv2Config
from nsa.methods.infllm_v2 import infllm_v2_attention
from nsa.serving.gathered import append_and_attend
from nsa.testing import brute_force_infllm_v2

CONFIG = InfLLMv2Config(kernel_size=4, kernel_stride=2, block_size=4, topk=3, init_blocks=1, window_size=4, dense_len=8)


def test_chunks_and_steps_are_the_whole_and_block_0_stays():
    lengths, size, h, g, d = (37, 0, 21), 8, 4, 2, 8
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        [torch.randn(n, heads, d, generator=generator, dtype=torch.float64) for n in lengths] for heads in (h, g, g)
    )
    memory = tuple(torch.full((20, size, g, d), torch.nan, dtype=torch.float64) for _ in range(2))
    table = (torch.randperm(19, generator=generator)[:15] + 1).view(3, 5)
    table[1] = 0
    attention = partial(infllm_v2_attention, config=CONFIG)
    found, done = [[], [], []], [0, 0, 0]
    for counts in ((20, 0, 3), (1, 0, 0), (15, 0, 17), (1, 0, 1)):
        starts, packed = [0], [[], [], []]
        for row, count in enumerate(counts):
            for xs, x in zip(packed, (q, k, v), strict=True):
                xs.append(x[row][done[row] : done[row] + count])
            done[row] += count
            starts.append(starts[-1] + count)
        given = [torch.cat([*xs, xs[0].new_full((2, *xs[0].shape[1:]), torch.nan)]) for xs in packed]
        out = append_and_attend(*given, memory, table, starts, done, attention)
        assert not out[starts[-1] :].any()
        for row, parts in enumerate(found):
            parts.append(out[starts[row] : starts[row + 1]])
    assert all(x[0].isnan().all() for x in memory)
    for row in (0, 2):
        truth = brute_force_infllm_v2.infllm_v2_attention(q[row], k[row], v[row], CONFIG)
        torch.testing.assert_close(torch.cat(found[row]), truth, rtol=1e-10, atol=1e-10)
