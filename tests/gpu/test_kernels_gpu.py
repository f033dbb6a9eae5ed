"""The kernels on a GPU against fp64, within twice the error of plain PyTorch in the same dtype (`make test-gpu`)."""

import pytest
import torch
from cases import CHECKS, DEFAULT, Case, Run, whole
from layouts import LAYOUTS, Layout
from poison import poisoned_memory

from nsa.config import NSAConfig
from nsa.kernels.functional import native_sparse_attention as on_kernels
from nsa.ops.compress import compress, phi_mean
from nsa.testing import INPUT_FAMILIES

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

CASES = [
    *(Case(layout=whole(1000), config=SPARSE, h=64, g=4, d=128, e=128, family=family) for family in INPUT_FAMILIES),
    *(Case(layout=whole(length)) for length in LENGTHS),
    *(Case(layout=whole(300), config=SMALL, h=2 * group, g=2, d=64, e=64) for group in (1, 2, 3, 4, 6, 8, 16, 32)),
    *(Case(layout=whole(300), config=SMALL, h=8, g=2, d=d, e=e) for d, e in WIDTHS),
    *(Case(layout=whole(300), config=SMALL, h=8, g=2, dtype=dtype) for dtype in DTYPES),
    *(Case(layout=whole(700), config=config, h=8, g=2) for config in (DEFAULT, SPARSE, ODD, FLAT)),
    Case(layout=Layout(b=2, t=100, s=1000), config=SPARSE, h=8, g=2),
    Case(layout=Layout(t=1200, s=1200, cu_seqlens_q=(0, 300, 303, 303, 340, 1200)), config=SPARSE, h=8, g=2),
    Case(
        layout=Layout(t=217, s=1300, cu_seqlens_q=(0, 64, 64, 100, 217), cu_seqlens_k=(0, 500, 520, 900, 1300)),
        config=SMALL, h=8, g=2,
    ),
    Case(layout=Layout(b=4, t=200, s=700, seqlens_k=(700, 0, 150, 333)), config=SPARSE, h=8, g=2),
    *(Case(layout=layout, config=SMALL, h=4, g=2) for name, layout in LAYOUTS.items() if name != "one token"),
]  # fmt: skip


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_kernel_is_within_the_budget(case: Case, check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(case, "cuda")
    poisoned_memory(monkeypatch)
    getattr(run, check)()


def _inputs(length: int, generator: torch.Generator) -> list[torch.Tensor]:
    shapes = [(1, length, 16, 128), (1, length, 1, 128), (1, length, 1, 128), (1, length, 16, 3)]
    q, k, v, gates = (torch.randn(shape, generator=generator, dtype=torch.bfloat16, device="cuda") for shape in shapes)
    return [x.requires_grad_() for x in (q, k, v, gates.detach().sigmoid())]


def native_sparse_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gates: torch.Tensor, config: NSAConfig
) -> torch.Tensor:
    k_cmp, v_cmp = (compress(x, phi_mean, config) for x in (k, v))
    return on_kernels(q, k, v, gates, config, k_cmp=k_cmp, v_cmp=v_cmp)


def _out_and_gradients(function, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    out = function(*inputs, DEFAULT)
    return [out, *torch.autograd.grad(out.float().square().sum(), inputs)]


@pytest.fixture
def cuda_generator() -> torch.Generator:
    return torch.Generator("cuda").manual_seed(0)


def test_gradients_repeat_bit_by_bit(cuda_generator: torch.Generator) -> None:
    inputs = _inputs(5000, cuda_generator)
    torch.use_deterministic_algorithms(True)
    try:
        for x, y in zip(*(_out_and_gradients(native_sparse_attention, inputs) for _ in range(2)), strict=True):
            assert torch.equal(x, y)
    finally:
        torch.use_deterministic_algorithms(False)


def test_torch_compile_takes_the_whole_without_a_graph_break(cuda_generator: torch.Generator) -> None:
    inputs = _inputs(1000, cuda_generator)
    compiled = torch.compile(native_sparse_attention, fullgraph=True)
    for x, y in zip(*(_out_and_gradients(f, inputs) for f in (native_sparse_attention, compiled)), strict=True):
        torch.testing.assert_close(x, y)


def test_no_step_waits_for_the_device(cuda_generator: torch.Generator) -> None:
    inputs = _inputs(1000, cuda_generator)
    _out_and_gradients(native_sparse_attention, inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        _out_and_gradients(native_sparse_attention, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_million_tokens_end_as_their_last_queries_do(cuda_generator: torch.Generator) -> None:
    q, k, v, gates = (x.detach() for x in _inputs(1 << 20, cuda_generator))
    out = native_sparse_attention(q, k, v, gates, DEFAULT)
    last = slice(-100, None)
    alone = native_sparse_attention(q[:, last], k, v, gates[:, last], DEFAULT)
    torch.testing.assert_close(out[:, last], alone)
    assert out.isfinite().all()
