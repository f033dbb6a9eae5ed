"""Other widths of heads, and InfLLM-V2's lists, compile ahead of time within the limits too."""

import pytest
from compiling import HOPPER, SHARED, STACK, compiled


@pytest.mark.parametrize("architecture", ["80", "90"])
def test_the_papers_own_widths_are_not_padded_to_256(architecture: str) -> None:
    found = compiled(architecture, "bfloat16", 64, 4, 192, 128, "--training")
    assert (found.keys() >= HOPPER) == (architecture == "90")
    for name, kernel in found.items():
        assert kernel["shared"] <= SHARED[architecture], (name, kernel)
        assert kernel["stack"] <= STACK.get(name, 192), (name, kernel)
        if name in HOPPER:
            assert kernel["wgmma"] > 0, (name, kernel)
            assert kernel["shared"] <= SHARED[architecture] // 2, (name, kernel)


def test_wide_heads_fit_the_smallest_device() -> None:
    for name, kernel in compiled("89", "float16", 16, 1, 256, 256).items():
        assert kernel["shared"] <= SHARED["89"], (name, kernel)


def test_infllm_v2_with_minicpms_sizes_fits_without_spilling() -> None:
    architecture = "90"
    found = compiled(architecture, "bfloat16", 32, 2, 128, 128, "--infllm-v2")
    assert {"scoring_kernel", "top_blocks_kernel", "union_kernel"} <= found.keys()  # scored by maximum on Hopper too
    for name, kernel in found.items():
        assert kernel["shared"] <= SHARED[architecture], (name, kernel)
        assert kernel["stack"] <= STACK.get(name, 64), (name, kernel)
