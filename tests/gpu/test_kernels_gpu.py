"""The kernels on a GPU against fp64, within twice the error of plain PyTorch in the same dtype (`make test-gpu`)."""

import pytest
import torch
from cases import CHECKS, DEFAULT, Case, Run, whole
from layouts import LAYOUTS, Layout
from poison import poisoned_memory

from nsa.config import NSAConfig
from nsa.kernels import selected_by_block, selected_gradients
from nsa.kernels.rows import rowsum_delta
from nsa.kernels.selected_forward import selected_forward
from nsa.modules.rotary import rotate
from nsa.testing import INPUT_FAMILIES, assert_close_to_fp64

pytestmark = pytest.mark.gpu

# The defaults with fewer picks and a shorter window, so that a thousand tokens are sparse.
SPARSE = NSAConfig(num_selected_blocks=4, window_size=128)
SMALL = NSAConfig(
    compress_block_size=16, compress_stride=8, select_block_size=32, num_selected_blocks=5, window_size=100
)
ODD = NSAConfig(compress_block_size=48, compress_stride=16, select_block_size=48, num_selected_blocks=6, window_size=77)
FLAT = NSAConfig(
    compress_block_size=32, compress_stride=32, select_block_size=128, num_selected_blocks=4, window_size=65
)
WIDTHS = ((8, 8), (80, 96), (96, 80), (192, 128), (256, 256))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# With one key the gradient of q is exactly 0: only rounding would be compared.
LENGTHS = (2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 507, 511, 512, 513, 1000, 4097)
PACKED = Layout(t=1200, s=1200, cu_seqlens_q=(0, 300, 303, 303, 340, 1200))
RAGGED = Layout(b=4, t=200, s=700, seqlens_k=(700, 0, 150, 333))

CASES = [
    *(Case(layout=whole(1000), config=SPARSE, h=64, g=4, d=128, e=128, family=family) for family in INPUT_FAMILIES),
    *(Case(layout=whole(1000), config=SPARSE, h=8, g=2, family=family) for family in INPUT_FAMILIES),
    *(Case(layout=whole(length)) for length in LENGTHS),
    *(Case(layout=whole(300), config=SMALL, h=2 * group, g=2, d=64, e=64) for group in (1, 2, 3, 4, 6, 8, 16, 32)),
    Case(layout=whole(8192), config=NSAConfig(compress_block_size=16), h=3, g=1, d=64, e=64),  # SmolLM2's heads
    *(Case(layout=whole(1500), config=SPARSE, h=2 * group, g=2, d=128, e=128) for group in (1, 4)),
    *(Case(layout=whole(300), config=SMALL, h=8, g=2, d=d, e=e) for d, e in WIDTHS),
    *(Case(layout=whole(300), config=SMALL, h=8, g=2, dtype=dtype) for dtype in DTYPES),
    *(Case(layout=whole(700), config=config, h=8, g=2) for config in (DEFAULT, SPARSE, ODD, FLAT)),
    *(Case(layout=layout, config=SPARSE, h=64, g=4, d=192, e=128) for layout in (whole(1000), PACKED, RAGGED)),
    Case(layout=Layout(b=2, t=100, s=1000), config=SPARSE, h=8, g=2),
    Case(layout=PACKED, config=SPARSE, h=8, g=2),
    Case(
        layout=Layout(t=217, s=1300, cu_seqlens_q=(0, 64, 64, 100, 217), cu_seqlens_k=(0, 500, 520, 900, 1300)),
        config=SMALL, h=8, g=2,
    ),
    Case(layout=RAGGED, config=SPARSE, h=8, g=2),
    *(Case(layout=layout, config=SMALL, h=4, g=2) for name, layout in LAYOUTS.items() if name != "one token"),
]  # fmt: skip


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_kernel_is_within_the_budget(case: Case, check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(case, "cuda")
    poisoned_memory(monkeypatch)
    getattr(run, check)()


@pytest.mark.parametrize("group", [1, 2, 3, 4])
def test_small_groups_repeat_bit_by_bit_whatever_shares_a_tile(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(Case(layout=whole(3000), config=SPARSE, h=2 * group, g=2), "cuda")
    indices = run.block_indices()
    poisoned_memory(monkeypatch)

    def attend() -> tuple[torch.Tensor, ...]:
        out, lse = selected_forward(run.q, run.k, run.v, indices, run.raw, SPARSE, run.scale)
        given = (run.q, run.k, run.v, indices, run.d_out, lse, rowsum_delta(out, run.d_out, None))
        return out, lse, *selected_gradients.selected_gradients(*given, run.raw, SPARSE, run.scale)

    first = attend()
    for _ in range(3):
        assert all(torch.equal(x, y) for x, y in zip(first, attend(), strict=True))
    monkeypatch.setattr(selected_by_block, "PARTS_BYTES", 1 << 20)  # other passes, other lists
    monkeypatch.setattr(selected_gradients, "PARTS_BYTES", 1 << 20)
    again = attend()  # the sums of dk and dv are cut elsewhere
    assert all(torch.equal(x, y) for x, y in zip(first[:3], again[:3], strict=True))
    for x, y in zip(first[3:], again[3:], strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (3, 64), (1, 80), (3, 128)])
def test_the_rotation_is_within_the_budget(rows: int, width: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, 8, 700, width, device="cuda", dtype=dtype).transpose(1, 2)
    angles = torch.randn(rows, 700, width, device="cuda")
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    truth, plain = rotate(x.double(), cos.double(), sin.double()), rotate(x, cos, sin)
    with torch.no_grad():
        found = rotate(x, cos, sin)
    assert_close_to_fp64(found, plain, truth, "rotated", largest_score=1.0)
