"""InfLLM-V2 on a GPU: the kernels attend within the budget, in every layout, with lists longer than n and without."""

import pytest
import torch
from infllm_v2_checks import check
from layouts import Layout

from nsa.config import InfLLMv2Config
from nsa.models import NSALlamaConfig, NSALlamaForCausalLM

pytestmark = pytest.mark.gpu

SPARSE = InfLLMv2Config(kernel_size=16, kernel_stride=8, block_size=32, window_size=96, topk=4, dense_len=0)
LONG_LISTS = InfLLMv2Config(kernel_size=16, kernel_stride=8, block_size=32, window_size=96, topk=4, dense_len=400)
LAYOUTS = {
    "whole": Layout(b=2, t=700, s=700),
    "suffix": Layout(b=2, t=100, s=700),
    "one query": Layout(b=3, t=1, s=700),
    "packed": Layout(t=700, s=700, cu_seqlens_q=(0, 300, 303, 303, 340, 700)),
    "ragged rows": Layout(b=4, t=200, s=700, seqlens_k=(700, 0, 150, 333)),
}


@pytest.mark.parametrize("config", [SPARSE, LONG_LISTS], ids=["sparse", "long lists"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("h", "g"), [(16, 1), (4, 2)])
def test_output_and_gradients_are_within_the_budget(layout: str, config: InfLLMv2Config, h: int, g: int) -> None:
    check(LAYOUTS[layout], config, torch.bfloat16, "cuda", h=h, g=g, d=64, e=64)


def test_minicpms_sizes_at_twelve_thousand_tokens() -> None:
    check(Layout(t=12000, s=12000), InfLLMv2Config(), torch.bfloat16, "cuda", h=16, g=1, d=128, e=128)


def test_everything_read_is_dense_attention_on_the_kernels() -> None:
    check(Layout(b=2, t=700, s=700), InfLLMv2Config(), torch.bfloat16, "cuda", h=8, g=2, d=64, e=64)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_generation_is_that_without_a_cache(implementation: str) -> None:
    torch.manual_seed(0)
    sizes = {"kernel_size": 16, "kernel_stride": 8, "block_size": 16, "window_size": 32, "topk": 3, "dense_len": 100}
    model = NSALlamaForCausalLM(
        NSALlamaConfig(
            attention="infllm_v2", infllm_v2=sizes, vocab_size=96, hidden_size=64, intermediate_size=96,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, initializer_range=0.2,
            bos_token_id=1, eos_token_id=None, pad_token_id=0,
        )
    ).to("cuda").eval()  # fmt: skip
    ids = torch.randint(2, 96, (2, 150), device="cuda")
    options = {"max_new_tokens": 30, "do_sample": False}
    cached = model.generate(ids, cache_implementation=implementation, **options)
    assert "no step that the device takes alone" in model.decode_path
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
