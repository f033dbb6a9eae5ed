"""The function on a GPU: the kernels by themselves, the ops when asked, in every layout, at any length."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from cases import DEFAULT
from layouts import Layout
from poison import poisoned_memory
from torch import Tensor

from nsa.backend import resolve, use_backend
from nsa.config import NSAConfig
from nsa.functional import native_sparse_attention
from nsa.kernels import library
from nsa.methods.oracle import selection_by_mass
from nsa.ops.compress import compress, phi_mean
from nsa.testing import assert_close_to_fp64, assert_same_selection

pytestmark = pytest.mark.gpu

SMALL = NSAConfig(
    compress_block_size=16, compress_stride=8, select_block_size=32, num_selected_blocks=5, window_size=100
)
LAYOUTS = {
    "whole": Layout(b=2, t=700, s=700),
    "suffix": Layout(b=2, t=100, s=700),
    "one query": Layout(b=3, t=1, s=700),
    "packed": Layout(t=700, s=700, cu_seqlens_q=(0, 300, 303, 303, 340, 700)),
    "ragged rows": Layout(b=4, t=200, s=700, seqlens_k=(700, 0, 150, 333)),
}
in_torch = partial(native_sparse_attention, backend="torch")


@pytest.fixture
def cuda_generator() -> torch.Generator:
    return torch.Generator("cuda").manual_seed(0)


def _inputs(
    layout: Layout, generator: torch.Generator, *, h: int = 16, g: int = 2, d: int = 64, dtype=torch.bfloat16
) -> list[Tensor]:
    """q, k, v, gates."""
    b, t, s = layout.b, layout.t, layout.s
    shapes = [(b, t, h, d), (b, s, g, d), (b, s, g, d), (b, t, h, 3)]
    q, k, v, gates = (torch.randn(shape, generator=generator, dtype=dtype, device="cuda") for shape in shapes)
    return [x.requires_grad_() for x in (q, k, v, gates.detach().sigmoid())]


def _out_and_gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), inputs)]


def test_an_oracle_reads_on_the_kernels_what_it_reads_in_torch(cuda_generator: torch.Generator) -> None:
    inputs = [x.detach() for x in _inputs(LAYOUTS["suffix"], cuda_generator, dtype=torch.float32)]
    with selection_by_mass():
        found, plain = (native_sparse_attention(*inputs, SMALL, backend=on) for on in ("triton", "torch"))
        truth = in_torch(*(x.double() for x in inputs), SMALL)
    assert_close_to_fp64(found, plain, truth, "oracle", largest_score=100.0)


@pytest.mark.parametrize("gates", ["sigmoid", "any sign"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_it_is_the_ops_and_their_gradients(
    name: str, gates: str, cuda_generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = LAYOUTS[name]
    inputs = _inputs(layout, cuda_generator)
    if gates == "any sign":
        with torch.no_grad():
            inputs[3].sub_(0.5).masked_fill_(inputs[3].abs() < 0.1, 0.0)
    lengths = {key: x.cuda() for key, x in layout.lengths().items()}
    truth = _out_and_gradients(
        partial(in_torch, config=SMALL, **lengths), [x.detach().double().requires_grad_() for x in inputs]
    )
    plain = _out_and_gradients(partial(in_torch, config=SMALL, **lengths), inputs)
    poisoned_memory(monkeypatch)
    assert resolve(*inputs[:3]) == "triton"
    found = _out_and_gradients(
        partial(native_sparse_attention, config=SMALL, nonnegative_gates=gates == "sigmoid", **lengths), inputs
    )
    for part, *three in zip(("out", "dq", "dk", "dv", "dgates"), found, plain, truth, strict=True):
        assert_close_to_fp64(*three, f"{name} {part}", largest_score=100.0)


def test_what_the_kernels_do_not_take_goes_to_the_ops_or_is_refused(cuda_generator: torch.Generator) -> None:
    doubles = [x.detach().double() for x in _inputs(LAYOUTS["suffix"], cuda_generator)]
    assert native_sparse_attention(*doubles, SMALL).dtype == torch.float64
    with (
        use_backend("triton"),
        pytest.raises(ValueError, match=r"^backend 'triton' cannot serve: expected one dtype of float32, .*float64"),
    ):
        native_sparse_attention(*doubles, SMALL)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_what_attends(dtype: torch.dtype, cuda_generator: torch.Generator) -> None:
    q, k, v, gates = _inputs(LAYOUTS["suffix"], cuda_generator, dtype=torch.float32)
    with torch.autocast("cuda", dtype):
        out = native_sparse_attention(q, k.to(dtype), v, gates, SMALL)
    assert torch.equal(out, native_sparse_attention(q.to(dtype), k.to(dtype), v.to(dtype), gates, SMALL))
    assert all(x.dtype == torch.float32 for x in torch.autograd.grad(out.float().sum(), (q, k, v, gates)))


def test_gradients_repeat_bit_by_bit(cuda_generator: torch.Generator) -> None:
    inputs = _inputs(Layout(t=5000, s=5000), cuda_generator, g=1, d=128)
    torch.use_deterministic_algorithms(True)
    try:
        for x, y in zip(*(_out_and_gradients(native_sparse_attention, inputs) for _ in range(2)), strict=True):
            assert torch.equal(x, y)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("name", ["whole", "packed", "ragged rows"])
def test_no_step_waits_for_the_device(name: str, cuda_generator: torch.Generator) -> None:
    layout = LAYOUTS[name]
    q, k, v, gates = _inputs(layout, cuda_generator)
    cmp = [k.detach()[:, : layout.num_compressed_blocks(SMALL)].clone().requires_grad_() for _ in range(2)]
    lengths = {key: x.cuda() for key, x in layout.lengths().items()}

    def step() -> None:
        out = native_sparse_attention(q, k, v, gates, SMALL, k_cmp=cmp[0], v_cmp=cmp[1], **lengths)
        torch.autograd.grad(out.square().sum(), (q, k, v, gates, *cmp))

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_64k_tokens_forward_and_backward_fit_in_12_gib(cuda_generator: torch.Generator) -> None:
    inputs = _inputs(Layout(t=65536, s=65536), cuda_generator, h=64, g=4, d=128)
    d_out = torch.randn(inputs[0].shape, generator=cuda_generator, dtype=torch.bfloat16, device="cuda")
    others = torch.cuda.memory_allocated() - sum(x.untyped_storage().nbytes() for x in (*inputs, d_out))
    torch.cuda.reset_peak_memory_stats()
    out = native_sparse_attention(*inputs, nonnegative_gates=True)
    torch.autograd.grad(out, inputs, d_out)
    assert torch.cuda.max_memory_allocated() - others <= 12 * 2**30


def test_a_million_tokens_at_sampled_queries(cuda_generator: torch.Generator) -> None:
    """Row bases pass 2^31 elements; out and dq of single queries against fp64, given the blocks that were selected."""
    length, h, d, config = 1 << 20, 32, 64, DEFAULT
    scale = d**-0.5
    inputs = _inputs(Layout(t=length, s=length), cuda_generator, h=h, g=1, d=d)
    q, k, v, gates = (x.detach() for x in inputs)
    assert q.numel() >= 1 << 31
    k_cmp, v_cmp = (compress(x, phi_mean, config) for x in (k, v))
    d_out = torch.randn(q.shape, generator=cuda_generator, dtype=q.dtype, device="cuda")
    keys, where, rest = [k_cmp, v_cmp, k, v, k, v], [None] * 4, (config.sizes, scale, True, 0)
    out, *saved = library.whole(q, keys, gates, where, *rest)
    dq = library.whole_backward(q, keys, gates, d_out, saved, where, *rest)[0]
    block_indices = saved[6]

    at = torch.tensor([31, 600, 65536, 524287, 1000001, length - 1], device="cuda")
    positions = at[:, None]
    blocks = torch.arange(k_cmp.shape[1], device="cuda")
    key = torch.arange(length, device="cuda")
    own = (key[None] // config.select_block_size)[:, None, :]
    visible = (
        blocks * config.compress_stride + config.compress_block_size - 1 <= positions,
        (own == block_indices[0, at, 0][:, :, None]).any(1) & (key <= positions),
        (key <= positions) & (key > positions - config.window_size),
    )

    def reference(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        rows = q[0, at].to(dtype).requires_grad_()
        total = 0
        for branch, (one_k, one_v) in enumerate(((k_cmp, v_cmp), (k, v), (k, v))):
            scores = torch.einsum("qhd,kd->qhk", rows, one_k[0, :, 0].to(dtype)) * scale
            hidden = ~visible[branch][:, None]
            p = scores.masked_fill(hidden, -torch.inf).softmax(-1).masked_fill(hidden, 0.0)
            total = total + gates[0, at, :, branch, None].to(dtype) * (p.nan_to_num() @ one_v[0, :, 0].to(dtype))
        return total.detach(), torch.autograd.grad(total, rows, d_out[0, at].to(dtype))[0]

    for name, x, plain, truth in zip(
        ("out", "dq"), (out[0, at], dq[0, at]), reference(q.dtype), reference(torch.float64), strict=True
    ):
        assert_close_to_fp64(x, plain, truth, name, largest_score=100.0)

    def block_scores(dtype: torch.dtype) -> Tensor:
        scores = torch.einsum("qhd,kd->qhk", q[0, at].to(dtype), k_cmp[0, :, 0].to(dtype)) * scale
        p = scores.masked_fill(~visible[0][:, None], -torch.inf).softmax(-1).nan_to_num().sum(1)
        strides = p.new_zeros(len(at), length // config.compress_stride)
        for shift in range(config.compress_block_size // config.compress_stride):
            strides[:, shift : shift + p.shape[1]] += p
        return strides.unflatten(1, (-1, config.select_block_size // config.compress_stride)).sum(-1)[None, :, None]

    assert_same_selection(
        block_indices[:, at], block_scores(torch.float64), at[None], config, plain_scores=block_scores(torch.float32)
    )
