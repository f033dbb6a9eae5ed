"""torch.compile and opcheck on a GPU; `test_compiled_gpu.py` runs this file in a process of its own.

Without the tests' conftest: its shape checks wrap functions in a way that torch.compile cannot trace.
"""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from nsa import NativeSparseAttention, NSAConfig
from nsa.functional import native_sparse_attention
from nsa.kernels import library

CONFIG = NSAConfig(
    compress_block_size=16, compress_stride=8, select_block_size=32, num_selected_blocks=5, window_size=100
)


def _inputs(length: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(1, length, 16, 64), (1, length, 2, 64), (1, length, 2, 64), (1, length, 16, 3)]
    q, k, v, gates = (torch.randn(shape, generator=generator, dtype=dtype, device="cuda") for shape in shapes)
    return [x.requires_grad_() for x in (q, k, v, gates.detach().sigmoid())]


def _out_and_gradients(function: Callable[..., Tensor], inputs: list[Tensor], *others: Tensor) -> list[Tensor]:
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), [*inputs, *others])]


def _assert_close(names: Iterable[str], found: list[Tensor], expected: list[Tensor]) -> None:
    """Up to the rounding that another order of sums brings."""
    for name, x, y in zip(names, found, expected, strict=True):
        eps = torch.finfo(x.dtype).eps
        error, size = float((x - y).norm()), float(y.norm())
        assert error <= eps * size * 8, f"{name}: differs by {error:.3g} of {size:.3g}"


def test_the_function_compiles_whole_forward_and_backward_at_any_length() -> None:
    function = partial(native_sparse_attention, config=CONFIG, backend="triton")
    compiled = torch.compile(function, fullgraph=True)
    for length in (1000, 1300, 517):
        inputs = _inputs(length)
        _assert_close(
            ("out", "dq", "dk", "dv", "dgates"),
            _out_and_gradients(compiled, inputs),
            _out_and_gradients(function, inputs),
        )


def test_the_layer_compiles_whole_in_training() -> None:
    torch.manual_seed(0)
    layer = NativeSparseAttention(128, 8, 2, 32, 64, CONFIG).cuda()
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(2, 500, 128, device="cuda", requires_grad=True)
    parameters = list(layer.parameters())
    _assert_close(
        ["out", "dx", *(name for name, _ in layer.named_parameters())],
        _out_and_gradients(compiled, [x], *parameters),
        _out_and_gradients(layer, [x], *parameters),
    )


def test_the_layer_compiles_whole_under_autocast() -> None:
    torch.manual_seed(0)
    layer = NativeSparseAttention(128, 8, 2, 32, 64, CONFIG).cuda()

    @torch.compile(fullgraph=True)
    def loss(x: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return layer(x).float().square().mean()

    loss(torch.randn(2, 500, 128, device="cuda")).backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_the_operators_are_registered_right() -> None:
    q, k, v, gates = _inputs(300, torch.float32)
    k_cmp, v_cmp = (x.detach()[:, :36].clone().requires_grad_() for x in (k, v))
    nowhere, sizes = (None, None, None), library.sizes_of(CONFIG)
    block_indices = torch.full((1, 300, 2, 5), -1, dtype=torch.int32, device="cuda")
    block_indices[..., 0] = 0
    _, lse = library.contiguous_attention(q, k, v, *nowhere, 300, 1, 1, 100, 0.1)
    for op, arguments in (
        (library.contiguous_attention, (q, k, v, *nowhere, 300, 1, 1, 100, 0.1)),
        (library.top_blocks, (q.detach(), k_cmp.detach(), lse.detach(), *nowhere, 300, sizes, 0.1)),
        (library.selected_attention, (q, k, v, block_indices, *nowhere, sizes, 0.1)),
        (library.whole, (q, k_cmp, v_cmp, k, v, k, v, gates, *nowhere, None, sizes, 0.1, True)),
    ):
        torch.library.opcheck(op, arguments)
