"""The function, its operators and the layer on the kernels, in Triton's interpreter.

`test_interpreter_function.py` runs this file. Sizes are tiny, as in interpreted.py.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from fast_interpreter import few_programs
from moved import moved
from poison import poisoned_memory

from nsa.backend import resolve, use_backend
from nsa.config import NSAConfig
from nsa.functional import native_sparse_attention
from nsa.kernels import library
from nsa.modules.attention import NativeSparseAttention
from nsa.ops.attend import attend
from nsa.ops.selected_attention import selected_attention as op_selected_attention
from nsa.ops.window_attention import window_attention
from nsa.streams import Blocks, Causal, Stream, Window
from nsa.testing import assert_close_to_fp64

SMALL = NSAConfig(compress_block_size=4, compress_stride=2, select_block_size=4, num_selected_blocks=4, window_size=6)
ALL_BLOCKS = replace(SMALL, num_selected_blocks=5)  # of 19 tokens


torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned_memory(monkeypatch)
    few_programs(monkeypatch)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _inputs(dtype: torch.dtype, generator: torch.Generator) -> list[torch.Tensor]:
    shapes = [(1, 19, 4, 8), (1, 19, 2, 8), (1, 19, 2, 16), (1, 19, 4, 3)]
    q, k, v, gates = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [x.to(dtype).requires_grad_() for x in (q, k, v, gates.sigmoid())]


in_torch = partial(native_sparse_attention, backend="torch")
in_triton = partial(native_sparse_attention, backend="triton")


def _out_and_gradients(function, inputs: list[torch.Tensor], config: NSAConfig = SMALL) -> list[torch.Tensor]:
    out = function(*inputs, config)
    return [out, *torch.autograd.grad(out.square().sum(), inputs)]


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")  # numpy, of a gate of 0
@pytest.mark.parametrize(
    ("gates", "config"),
    [("any sign", SMALL), ("known nonnegative", SMALL), ("any sign", ALL_BLOCKS), ("known nonnegative", ALL_BLOCKS)],
)
def test_the_function_and_its_gradients_are_those_of_the_ops(
    generator: torch.Generator, gates: str, config: NSAConfig
) -> None:
    inputs = _inputs(torch.float32, generator)
    if gates == "any sign":
        with torch.no_grad():
            inputs[3].sub_(0.5).masked_fill_(inputs[3].abs() < 0.1, 0.0)
    in_triton = partial(native_sparse_attention, backend="triton", nonnegative_gates=gates == "known nonnegative")
    truth = _out_and_gradients(in_torch, [x.detach().double().requires_grad_() for x in inputs], config)
    plain, found = (_out_and_gradients(function, inputs, config) for function in (in_torch, in_triton))
    for name, x, p, t in zip(("out", "dq", "dk", "dv", "dgates"), found, plain, truth, strict=True):
        assert_close_to_fp64(x, p, t, name, largest_score=100.0)


def test_window_keys_without_lengths_are_as_many_as_the_rows_have(generator: torch.Generator) -> None:
    shapes = {"q": (2, 4), "k": (9, 2), "v": (9, 2), "k_win": (9, 2), "v_win": (9, 2)}
    tensors = {name: torch.randn(2, *shape, 8, generator=generator) for name, shape in shapes.items()}
    tensors |= {"gates": torch.rand(2, 2, 4, 3, generator=generator), "seqlens_k": torch.tensor([9, 4])}
    torch.testing.assert_close(in_triton(**tensors, config=SMALL), in_torch(**tensors, config=SMALL))


def test_a_branch_alone_is_the_op_and_its_gradient(generator: torch.Generator) -> None:
    *inputs, _ = _inputs(torch.float32, generator)
    indices = torch.full((1, 19, 2, 4), -1, dtype=torch.int32)
    indices[..., 0] = 0
    indices[:, 16:, :, 1] = 2
    where, sizes, scale = (None, None, None), library.sizes_of(SMALL), 8**-0.5
    branches = {
        "window": (
            lambda q, k, v: library.contiguous_attention(q, k, v, *where, 19, 1, 1, 6, scale),
            lambda q, k, v: window_attention(q, k, v, 6),
        ),
        "selected": (
            lambda q, k, v: library.selected_attention(q, k, v, indices, *where, sizes, scale),
            lambda q, k, v: op_selected_attention(q, k, v, indices, SMALL),
        ),
    }
    for name, (kernel, op) in branches.items():
        found = []
        for function, dtype in ((kernel, torch.float32), (op, torch.float32), (op, torch.float64)):
            xs = [x.detach().to(dtype).requires_grad_() for x in inputs]
            out, _ = function(*xs)  # the log-sum-exp plays no part in the loss
            found.append([out.detach(), *torch.autograd.grad(out.square().sum(), xs)])
        for part, x, plain, truth in zip(("out", "dq", "dk", "dv"), *found, strict=True):
            assert_close_to_fp64(x, plain, truth, f"{name} {part}", largest_score=100.0)


def test_every_reach_on_the_kernels_is_that_in_torch(generator: torch.Generator) -> None:
    q, k, v, _ = (x.detach() for x in _inputs(torch.float32, generator))
    k_cmp, v_cmp = k[:, : SMALL.num_compressed_blocks(19)], v[:, : SMALL.num_compressed_blocks(19)]
    indices = torch.full((1, 19, 2, 4), -1, dtype=torch.int32)
    indices[..., 0] = 0
    block, stride = SMALL.compress_block_size, SMALL.compress_stride
    for stream, reach in (
        (Stream(k_cmp, v_cmp, block, stride, num_tokens=19), Causal()),
        (Stream(k, v), Window(6)),
        (Stream(k, v), Blocks(indices, SMALL.select_block_size)),
        (Stream(k, v), Causal()),
    ):
        found, plain, truth = (
            attend(q.to(dtype), stream._replace(k=stream.k.to(dtype), v=stream.v.to(dtype)), reach, backend=backend)
            for backend, dtype in (("triton", torch.float32), ("torch", torch.float32), ("torch", torch.float64))
        )
        for part, *three in zip(("out", "lse"), found, plain, truth, strict=True):
            seen = truth[1] > -torch.inf
            three = [x[seen] for x in three]
            assert_close_to_fp64(*three, f"{reach} {part}", largest_score=100.0)


STRIDES: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),  # heads before tokens
    lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),  # head dims before tokens
    lambda x: torch.stack([x, x.flip(1)], dim=2).flatten(1, 2)[:, ::2],  # every second token of more
]
LENGTHS, SIZES = (None, None, None), library.sizes_of(SMALL)
OPERATORS = {
    "q k v": lambda *x: library.contiguous_attention(*x, *LENGTHS, x[1].shape[1], 1, 1, 2, 0.3)[0],
    "q k_cmp v_cmp": lambda *x: library.contiguous_attention(*x, *LENGTHS, x[0].shape[1] + 1, 4, 2, 0, 0.3)[0],
    "q k v indices": lambda *x: library.selected_attention(*x, *LENGTHS, SIZES, 0.3)[0],
    "q k_cmp v_cmp k v k_win v_win gates": lambda q, *x: library.whole(
        q, list(x[:6]), x[6], [*LENGTHS, None], SIZES, 0.3, False, 0
    )[0],
}


@pytest.mark.parametrize("names", OPERATORS)
@pytest.mark.parametrize("length", [3, 9])  # of three tokens no block of l = 4 is complete
def test_no_output_and_no_gradient_depends_on_strides(length: int, names: str, generator: torch.Generator) -> None:
    tokens = {"": length, "_cmp": SMALL.num_compressed_blocks(length), "_win": length}
    shapes = {f"{x}{branch}": (1, many, 2, 8) for branch, many in tokens.items() for x in "kv"}
    shapes |= {"q": (1, length - 1, 4, 8), "gates": (1, length - 1, 4, 3)}
    given = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    given["indices"] = torch.full((1, length - 1, 2, 4), -1, dtype=torch.int32)
    given["indices"][..., 0] = 0
    given["indices"][:, 7:, :, 1] = 1  # the ninth token's own block
    d_out = torch.randn(shapes["q"], generator=generator)

    def found(*changes: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        """Each input under the next of the changes."""
        change = itertools.cycle(changes)
        inputs = {name: next(change)(given[name].clone()) for name in names.split()}
        leaves = [x.requires_grad_() for name, x in inputs.items() if name != "indices"]
        out = OPERATORS[names](*inputs.values())
        return [out.detach(), *torch.autograd.grad(out, leaves, next(change)(d_out))]

    expected = found(torch.clone)
    for first in range(len(STRIDES)):
        for x, y in zip(found(*STRIDES[first:], *STRIDES[:first]), expected, strict=True):
            assert torch.equal(x, y)


def test_gradients_repeat_bit_by_bit(generator: torch.Generator) -> None:
    inputs = _inputs(torch.float16, generator)
    for x, y in zip(_out_and_gradients(in_triton, inputs), _out_and_gradients(in_triton, inputs), strict=True):
        assert torch.equal(x, y)


def test_torch_compile_takes_the_whole_without_a_graph_break(generator: torch.Generator) -> None:
    inputs = _inputs(torch.float32, generator)
    compiled = torch.compile(in_triton, fullgraph=True, backend="aot_eager")
    for x, y in zip(_out_and_gradients(in_triton, inputs), _out_and_gradients(compiled, inputs), strict=True):
        torch.testing.assert_close(x, y)


def test_auto_takes_the_kernels_where_they_serve(generator: torch.Generator) -> None:
    inputs = _inputs(torch.float32, generator)
    assert resolve(*inputs[:3]) == "triton"
    assert torch.equal(native_sparse_attention(*inputs, SMALL), in_triton(*inputs, SMALL))
    with use_backend("torch"):
        assert torch.equal(native_sparse_attention(*inputs, SMALL), in_torch(*inputs, SMALL))
    with pytest.raises(ValueError, match=r"^backend 'triton' cannot serve: expected one dtype of float32"):
        in_triton(*(x.double() for x in inputs), SMALL)
    doubles = native_sparse_attention(*(x.double() for x in inputs), SMALL)
    assert doubles.dtype == torch.float64


def test_shapes_that_do_not_fit_are_one_line(generator: torch.Generator) -> None:
    q, k, v, gates = _inputs(torch.float32, generator)
    k_cmp, v_cmp = k[:, :3], v[:, :3]
    cu = torch.tensor([0, 19], dtype=torch.int32)
    for arguments, options, message in (
        ((q, k, v[:, :5], gates), {}, r"v should have shape \[b=1, s=19, g=2, e\]"),
        ((q, k, v, gates[..., :2]), {}, r"gates should have shape"),
        ((q, k, v, gates), {"k_cmp": k_cmp, "v_cmp": v_cmp}, "expected 8 compressed blocks for 19 keys, got 3"),
        ((q, k[:, :9], v[:, :9], gates), {}, "expected t <= s, got t = 19, s = 9"),
        ((q, k, v, gates), {"seqlens_k": cu}, r"seqlens_k should have shape \[b=1\]"),
        (
            (q, k, v, gates),
            {"seqlens_win": cu[:1]},
            "seqlens_win is the length of k_win and v_win, which were not given",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            in_triton(*arguments, SMALL, **options)


@pytest.mark.parametrize(("b", "t"), [(0, 9), (1, 0)])
def test_no_rows_and_no_queries(b: int, t: int) -> None:
    q, k, gates = torch.zeros(b, t, 4, 8), torch.zeros(b, 9, 2, 8), torch.zeros(b, t, 4, 3)
    q.requires_grad_()
    out = in_triton(q, k, k, gates, SMALL)
    assert out.shape == (b, t, 4, 8)
    out.sum().backward()
    assert q.grad.shape == q.shape


def test_autocast_casts_what_attends_and_not_the_sums(generator: torch.Generator) -> None:
    q, k, v, gates = _inputs(torch.float32, generator)
    half = [x.detach().half() for x in (q, k, v)]
    for function in (in_torch, in_triton):
        with torch.autocast("cpu", torch.float16):
            out = function(q, k.half(), v, gates, SMALL)
        assert out.dtype == torch.float16
        assert torch.equal(out, function(*half, gates, SMALL))
        assert all(x.dtype == torch.float32 for x in torch.autograd.grad(out.float().sum(), (q, k, v, gates)))


def _layer() -> NativeSparseAttention:
    torch.manual_seed(0)
    layer = NativeSparseAttention(32, 4, 2, 8, config=SMALL)
    return moved(layer, 0.3)


def _layer_gradients(layer: NativeSparseAttention, x: torch.Tensor, backend: str, **kwargs) -> list[torch.Tensor]:
    x = x.detach().requires_grad_()
    with use_backend(backend):
        out = layer(x, **kwargs)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])]


@pytest.mark.parametrize("kind", ["whole", "padded", "packed"])
def test_the_layer_uses_the_kernels(kind: str) -> None:
    layer, x = _layer(), torch.randn(2, 21, 32)
    kwargs = {
        "padded": {"attention_mask": torch.ones(2, 21).index_put((torch.tensor(1), torch.arange(9)), torch.tensor(0.0))}
    }
    if kind == "packed":
        x = x[:1]
        kwargs["packed"] = {"cu_seqlens": torch.tensor([0, 2, 2, 21])}
    kwargs = kwargs.get(kind, {})
    found = _layer_gradients(layer, x, "triton", **kwargs)
    plain = _layer_gradients(layer, x, "torch", **kwargs)
    truth = _layer_gradients(layer.double(), x.double(), "torch", **kwargs)
    names = ["out", "x", *(name for name, _ in layer.named_parameters())]
    for name, *three in zip(names, found, plain, truth, strict=True):
        assert_close_to_fp64(*three, name, largest_score=100.0)


def test_torch_compile_takes_the_layer_without_a_graph_break() -> None:
    layer, x = _layer(), torch.randn(1, 21, 32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for name, a, b in zip(
        ["out", "x", *(name for name, _ in layer.named_parameters())],
        _layer_gradients(layer, x, "triton"),
        _layer_gradients(compiled, x, "triton"),
        strict=True,
    ):
        torch.testing.assert_close(b, a, msg=name)


def test_operators_are_registered_right(generator: torch.Generator) -> None:
    q, k, v, gates = (x.detach()[:, :9].requires_grad_() for x in _inputs(torch.float32, generator))
    where = (None, None, None)
    sizes = library.sizes_of(SMALL)
    out, lse = library.contiguous_attention(q, k, v, *where, 9, 1, 1, 5, 0.3)
    block_indices = torch.zeros(1, 9, 2, 4, dtype=torch.int32).fill_(-1)
    block_indices[..., 0] = 0
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for op, arguments in (
        (library.contiguous_attention, (q, k, v, *where, 9, 1, 1, 5, 0.3)),
        (library.top_blocks, (q.detach(), k.detach()[:, :3], lse.detach(), *where, 9, sizes, 0.3)),
        (library.selected_attention, (q, k, v, block_indices, *where, sizes, 0.3)),
        (library.whole, (q, [k[:, :3], v[:, :3], k, v, k, v], gates, [*where, None], sizes, 0.3, True, 0)),
    ):
        torch.library.opcheck(op, arguments, test_utils=checks)
    assert out.isfinite().all()
