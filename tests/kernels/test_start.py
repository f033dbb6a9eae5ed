"""What the host does for a forward and a backward: how many launches and operators, and finding compiled kernels again.

Nothing runs: tensors have no memory, and what would launch a kernel is counted.
"""

from collections import Counter
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel, make_backend
from triton.runtime import JITFunction
from triton.runtime.jit import create_function_from_signature

from nsa.config import NSAConfig
from nsa.functional import native_sparse_attention
from nsa.kernels import launch, start
from nsa.kernels.attention import Layouts, attention_backward, attention_forward, pairs
from nsa.kernels.contiguous_forward import contiguous_forward_kernel
from nsa.kernels.layout import Layout
from nsa.kernels.selected_backward import selected_dkdv_kernel
from nsa.streams import Branches

CONFIG = NSAConfig(num_selected_blocks=4)  # of the eight in a row of 512
MEMORY = {"empty", "empty_like", "new_empty", "full", "zeros", "select", "slice", "unbind", "detach", "alias"}


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16, device: str = "meta") -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *_, **__: found.append(self.fn.__name__))
    monkeypatch.setattr(launch, "shared_memory", lambda device: 232448)
    monkeypatch.setattr(launch, "is_hopper", lambda device: True)
    return found


class Operators(TorchDispatchMode):
    """Operators that do something: neither get memory nor look at it another way."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name not in MEMORY:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def counted(launched: list[str], function: Callable[[], Any]) -> tuple[Any, int, list[str]]:
    launched.clear()
    with Operators() as operators:
        result = function()
    return result, len(launched), operators.found


@pytest.mark.parametrize(
    ("case", "t", "g", "forward", "backward"),
    [
        ("rows", 512, 1, 7, 11),
        ("rows", 256, 1, 4, 7),  # all blocks are selected: nothing is scored, sorted or listed
        ("rows", 8192, 1, 7, 12),  # the early keys' queries are split
        ("rows", 512, 4, 10, 10),  # groups of four: by blocks, dq of the selected ones too
        ("packed", 512, 1, 10, 16),  # maps from tiles to sequences, each once for forward and backward
    ],
)
def test_launches_and_operators(
    case: str, t: int, g: int, forward: int, backward: int, launched: list[str]
) -> None:  # fmt: skip
    h, d = 16, 64
    q, gates, d_out = tensor(1, t, h, d), tensor(1, t, h, 3), tensor(1, t, h, d)
    keys = [tensor(1, keys, g, d) for keys in (CONFIG.num_compressed_blocks(t), t, t) for _ in "kv"]
    cu = tensor(4, dtype=torch.int32) if case == "packed" else None
    layouts = Layouts.of(q, Branches.of(CONFIG, keys, (cu, None, None, None)))
    (_, saved), launches, operators = counted(
        launched, lambda: attention_forward(q, pairs(keys), gates, layouts, CONFIG, 0.1)
    )
    assert (launches, operators) == (forward, [])
    _, launches, operators = counted(
        launched, lambda: attention_backward(q, pairs(keys), gates, d_out, saved, layouts, CONFIG, 0.1)
    )
    assert (launches, operators) == (backward, ["sort"] if t > 256 else [])


def test_layouts_of_the_same_sequences_share_their_maps(launched: list[str]) -> None:
    keys, cu = [tensor(1, 512, 1, 64)] * 6, tensor(4, dtype=torch.int32)
    layouts = Layouts.of(tensor(1, 512, 16, 64), Branches.of(CONFIG, keys, (cu, None, None, None)))
    assert layouts.win is layouts.slc
    assert layouts.cmp.query_tiles(4) is layouts.slc.query_tiles(4)
    assert layouts.cmp.key_tiles(512, 64) is not layouts.slc.key_tiles(512, 64)
    assert Counter(launched) == {"tile_map_kernel": 4}  # the fourth: where compressed keys begin


@pytest.mark.parametrize("gradients", [True, False])
def test_only_those_who_trace_see_an_operator(
    gradients: bool, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # tensors that are not on a GPU will do
    shapes = ((1, 64, 16, 64), (1, 64, 1, 64), (1, 64, 1, 64), (1, 64, 16, 3))
    inputs = [tensor(*shape, device="cpu").requires_grad_(gradients) for shape in shapes]
    with torch.profiler.profile() as profile:
        out = native_sparse_attention(*inputs, backend="triton")
    assert launched
    assert not [event.key for event in profile.key_averages() if event.key.startswith("nsa::")]
    assert (type(out.grad_fn).__name__ == "_AttentionBackward") == gradients

    launched.clear()
    with FakeTensorMode():
        fake = [tensor(*shape, device="cpu").requires_grad_(gradients) for shape in shapes]
        out = native_sparse_attention(*fake, backend="triton")
        assert out.shape == shapes[0]
        if gradients:
            assert [x.shape for x in torch.autograd.grad(out.sum(), fake)] == list(shapes)
    with Operators() as operators:
        native_sparse_attention(*inputs, backend="triton")
    assert operators.found.count("native_sparse_attention") == 1


def test_a_compiled_kernel_is_found_again_where_triton_would_find_it() -> None:
    names = [p.name for p in contiguous_forward_kernel.params if not p.is_constexpr]
    where = {name: i for i, name in enumerate(names)}
    room = torch.zeros(64, dtype=torch.bfloat16)
    usual = [room if i < 5 else None if i < 11 else 0.5 if name == "scale_log2" else 32 for i, name in enumerate(names)]
    variants = {
        "q": [room, room[8:], room[1:], room.float(), room.half()],
        "cu_q": [None, room.int(), room.int()[4:], room.int()[1:]],
        "stride_qt": [1, 2, 16, 17, 1 << 31, (1 << 31) + 1, 1 << 20, -16, 0],
        "num_keys": [1, 2, 16, 1 << 31],
    }
    all_arguments = []
    for values in product(*variants.values()):
        arguments = list(usual)
        for name, value in zip(variants, values, strict=True):
            arguments[where[name]] = value
        all_arguments.append(tuple(arguments))
    assert compiled_versions(contiguous_forward_kernel, all_arguments) > 100


def test_so_is_one_with_tuples_of_pointers_and_integers() -> None:
    names = [p.name for p in selected_dkdv_kernel.params if not p.is_constexpr]
    room = torch.zeros(64, dtype=torch.bfloat16)
    usual = [room if i < 13 else 0.5 if name == "scale" else 32 for i, name in enumerate(names)]
    all_arguments = []
    for pointer, stride in product([None, room.int(), room.int()[1:]], [1, 2, 16, 1 << 31]):
        arguments = dict(zip(names, usual, strict=True))
        arguments |= {"where": (None, pointer, None, None, None), "strides": (stride, *[32] * 11)}
        all_arguments.append(tuple(arguments.values()))
    assert compiled_versions(selected_dkdv_kernel, all_arguments) == 12


def compiled_versions(kernel: JITFunction, all_arguments: list[tuple[Any, ...]]) -> int:
    """How many there are of these calls; by our key as many as by Triton's, and the same."""
    bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))
    constants = {p.name: 16 for p in kernel.params if p.is_constexpr}
    ours = [tuple(start.key_of(kernel, arguments)) for arguments in all_arguments]
    theirs = [str(bind(*arguments, **constants)[1]) for arguments in all_arguments]
    pairs = set(zip(ours, theirs, strict=True))
    assert len(pairs) == len(set(ours)) == len(set(theirs))
    return len(pairs)


def test_a_second_launch_asks_triton_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    searched, ran = [], []

    class Compiled(CompiledKernel):
        def __init__(self) -> None: ...

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *arguments: ran.append((grid, len(arguments)))

    def run(self: JITFunction, *args: Any, **kwargs: Any) -> CompiledKernel:
        searched.append(self.fn.__name__)
        return Compiled()

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(start, "_compiled", {})
    starts = torch.zeros(4, dtype=torch.int32)
    for size in (4, 4, 8):  # no constant
        Layout(1, 512, 512, cu_seqlens_q=starts).query_tiles(size)
    Layout(1, 512, 512, cu_seqlens_q=starts.new_zeros(9)[1:]).query_tiles(4)  # its address is no multiple of 16
    assert searched == ["tile_map_kernel"] * 2
    assert ran == [((2, 1, 1), 9), ((1, 1, 1), 9)]  # 131 and 67 tiles
