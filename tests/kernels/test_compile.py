"""Every kernel compiles ahead of time for Ampere, Hopper and Blackwell, within their limits; no GPU is needed."""

import pytest
from compiling import HOPPER, SHARED, STACK, compiled

KERNELS = {
    "contiguous_forward_kernel",
    "contiguous_dq_kernel",
    "contiguous_dkdv_kernel",
    "scoring_kernel",
    "top_blocks_kernel",
    "union_kernel",
    "selected_forward_kernel",
    "count_picks_kernel",
    "segment_starts_kernel",
    "list_picks_kernel",
    "selected_parts_kernel",
    "merge_parts_kernel",
    "selected_dq_kernel",
    "selected_dkdv_kernel",
    "selected_dkdv_kernel with parts",
    "merge_dq_kernel",
    "sum_items_kernel",
    "sum_splits_kernel",
    "pick_segments_kernel",
    "segments_kernel",
    "tile_map_kernel",
    "combine_kernel",
    "signed_kernel",
    "gates_backward_kernel",
    "delta_kernel",
    "rotate_kernel",
    "rms_norm_kernel",
    "begin_kernel",
}
# Decoding has 16 rows, so its products are mma everywhere.
DECODING = {
    "decode_split_kernel",
    "decode_finish_kernel",
    "decode_append_kernel",
    "decode_append_kernel over tables",
    "project_kernel",
}
NOT_ON_HOPPER = {"selected_forward_kernel", "scoring_kernel"}
# With a product on the matrix units; 64 rows or more, so on Hopper by the warpgroup instruction.
MATRIX = ("contiguous", "compressed", "selected", "scoring")


@pytest.mark.parametrize("architecture", ["80", "90", "100"])
def test_the_papers_heads_fit_without_spilling(architecture: str) -> None:
    found = compiled(architecture, "bfloat16", 64, 4, 128, 128)
    decoding = {name: found.pop(name) for name in DECODING}
    for name, kernel in decoding.items():
        assert kernel["shared"] <= SHARED[architecture] // 2, (name, kernel)
        # Three programs share a multiprocessor's registers: some are saved around the loop over tiles.
        assert kernel["stack"] <= 128, (name, kernel)
        assert kernel["mma"] > 0, (name, kernel)
    assert found.keys() == (KERNELS - NOT_ON_HOPPER | HOPPER if architecture == "90" else KERNELS)
    for name, kernel in found.items():
        assert kernel["shared"] <= SHARED[architecture], (name, kernel)
        # A 64-byte stack is some registers saved around a loop; more would be traffic inside it.
        assert kernel["stack"] <= STACK.get(name, 64), (name, kernel)
    instruction = {"80": "mma", "90": "wgmma", "100": "tcgen05"}[architecture]
    for name, kernel in found.items():
        assert (kernel[instruction] > 0) == name.startswith(MATRIX), (name, kernel)
