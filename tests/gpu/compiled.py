"""torch.compile and opcheck on a GPU; `test_compiled_gpu.py` runs this file in a process of its own.

Without the tests' conftest: its shape checks wrap functions in a way that torch.compile cannot trace.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from nsa import NativeSparseAttention, NSAConfig
from nsa.backend import use_backend
from nsa.functional import native_sparse_attention
from nsa.kernels import library
from nsa.testing import assert_close_to_fp64

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
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [*inputs, *others])]


def test_the_function_compiles_whole_forward_and_backward_at_any_length() -> None:
    compiled = torch.compile(partial(native_sparse_attention, config=CONFIG, backend="triton"), fullgraph=True)
    in_torch = partial(native_sparse_attention, config=CONFIG, backend="torch")
    for length in (1000, 1300, 517):
        inputs = _inputs(length)
        found, plain = _out_and_gradients(compiled, inputs), _out_and_gradients(in_torch, inputs)
        truth = _out_and_gradients(in_torch, [x.detach().double().requires_grad_() for x in inputs])
        for name, *three in zip(("out", "dq", "dk", "dv", "dgates"), found, plain, truth, strict=True):
            assert_close_to_fp64(*three, f"{length} {name}", largest_score=100.0)


def test_the_layer_compiles_whole_in_training() -> None:
    torch.manual_seed(0)
    layer = NativeSparseAttention(128, 8, 2, 32, 64, CONFIG).cuda()
    with torch.no_grad():  # away from where phi and the gates start, so that nothing cancels
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    x = torch.randn(2, 500, 128, device="cuda", requires_grad=True)
    found = _out_and_gradients(torch.compile(layer, fullgraph=True), [x], *layer.parameters())
    with use_backend("torch"):
        plain = _out_and_gradients(layer, [x], *layer.parameters())
        truth = _out_and_gradients(layer.double(), [x.detach().double().requires_grad_()], *layer.parameters())
    names = ["out", "dx", *(name for name, _ in layer.named_parameters())]
    for name, *three in zip(names, found, plain, truth, strict=True):
        assert_close_to_fp64(*three, name, largest_score=100.0)


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
        (library.whole, (q, [k_cmp, v_cmp, k, v, k, v], gates, [*nowhere, None], sizes, 0.1, True, 0)),
    ):
        torch.library.opcheck(op, arguments)
