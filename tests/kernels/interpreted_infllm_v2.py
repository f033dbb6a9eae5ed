"""InfLLM-V2 on the kernels, in Triton's interpreter; `test_interpreter_function.py` runs this file."""

import pytest
import torch
from fast_interpreter import few_programs
from infllm_v2_checks import check
from layouts import Layout
from poison import poisoned_memory

from nsa.config import InfLLMv2Config

torch.set_num_threads(1)

SPARSE = InfLLMv2Config(kernel_size=4, kernel_stride=2, block_size=4, window_size=3, topk=2, dense_len=0)
LISTS_LONGER_THAN_N = InfLLMv2Config(kernel_size=4, kernel_stride=2, block_size=4, window_size=3, topk=2, dense_len=18)
# Sixteen pooled keys a block, as kernel_size = kernel_stride = 4 has in blocks of 64.
SMALL_POOL = InfLLMv2Config(kernel_size=2, kernel_stride=2, block_size=32, window_size=3, topk=2, dense_len=0)
DENSE = InfLLMv2Config(kernel_size=4, kernel_stride=2, block_size=4, window_size=3, topk=2, dense_len=64)


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned_memory(monkeypatch)
    few_programs(monkeypatch)


@pytest.mark.parametrize(
    ("layout", "config"),
    [
        (Layout(t=29, s=29), SPARSE),
        (Layout(t=5, s=29), LISTS_LONGER_THAN_N),
        (Layout(t=30, s=30, cu_seqlens_q=(0, 3, 3, 30)), LISTS_LONGER_THAN_N),
        (Layout(b=2, t=4, s=29, seqlens_k=(29, 2)), SPARSE),
        (Layout(b=2, t=4, s=29, seqlens_k=(29, 2)), DENSE),
        (Layout(t=5, s=150), SMALL_POOL),
    ],
    ids=["whole", "suffix", "packed", "ragged rows", "dense", "small pool"],
)
def test_output_and_gradients_are_within_the_budget(layout: Layout, config: InfLLMv2Config) -> None:
    check(layout, config, torch.float32, "cpu", h=2, g=1, d=8, e=8)


def test_a_group_of_many_heads() -> None:
    check(Layout(t=21, s=21), SPARSE, torch.float16, "cpu", h=6, g=1, d=16, e=8)
