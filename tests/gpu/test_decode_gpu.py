"""Decoding on a GPU: within twice the error of plain PyTorch, the same bits whatever the batch, pages or graph."""

from dataclasses import replace

import pytest
import torch
from decode_checks import MEMORY, check_append, check_attention, check_not_finite
from decoding import DecodeCase, Scene, append_arguments
from poison import poisoned_memory
from torch import Tensor

from nsa.cache_tensors import CacheTensors
from nsa.config import NSAConfig
from nsa.decoding import append_tokens, decode_attention

pytestmark = pytest.mark.gpu

DEFAULT = NSAConfig()
SPARSE = NSAConfig(num_selected_blocks=4, window_size=128, compression="mean")
SMALL = NSAConfig(
    compress_block_size=16, compress_stride=8, select_block_size=32, num_selected_blocks=5, window_size=100,
    compression="linear", shared_kv=True,
)  # fmt: skip
ODD = NSAConfig(compress_block_size=48, compress_stride=16, select_block_size=48, num_selected_blocks=6, window_size=77)
FLAT = NSAConfig(
    compress_block_size=32, compress_stride=32, select_block_size=128, num_selected_blocks=4, window_size=65
)
BF16 = {"dtype": torch.bfloat16, "h": 16, "g": 1, "d": 64, "e": 64}
BOUNDARIES = tuple(sorted({m + i for m in (16, 32, 64, 256, 512, 768, 1024, 1280, 2048) for i in (-1, 0, 1)} | {0, 1}))
DECODED = (1000, 0, 333, 64, 5)

CASES = [
    DecodeCase(lengths=BOUNDARIES, config=SPARSE, page_size=256, **BF16),
    DecodeCase(lengths=BOUNDARIES, config=DEFAULT, page_size=64, **BF16),
    DecodeCase(lengths=BOUNDARIES, config=replace(DEFAULT, shared_kv=True), **BF16),
    DecodeCase(lengths=(4097, 9000), config=DEFAULT, dtype=torch.bfloat16, h=64, g=4, d=128, e=128),
    DecodeCase(lengths=(20000, 40001), config=DEFAULT, dtype=torch.bfloat16, h=16, g=1, d=128, e=128, page_size=256),
    # More blocks than one step of the top n looks at.
    DecodeCase(lengths=(140000, 66000), config=DEFAULT, dtype=torch.bfloat16, h=2, g=1, d=64, e=64),
    *(DecodeCase(lengths=DECODED, t=t, config=SPARSE, page_size=64, **BF16) for t in (2, 3, 5, 16)),
    *(DecodeCase(lengths=DECODED, t=5, config=SMALL, dtype=torch.bfloat16, h=2 * group, g=2, d=64, e=64)
      for group in (1, 2, 3, 4, 6, 8, 16, 32)),
    *(DecodeCase(lengths=DECODED, config=config, page_size=size, dtype=torch.bfloat16, h=8, g=2, d=64, e=64)
      for config, size in ((SPARSE, 64), (SMALL, 32), (ODD, 48), (FLAT, 128), (ODD, None))),
    *(DecodeCase(lengths=DECODED, config=SPARSE, dtype=torch.bfloat16, h=8, g=2, d=d, e=e)
      for d, e in ((8, 8), (80, 96), (96, 80), (192, 128), (256, 256))),
    *(DecodeCase(lengths=DECODED, t=2, config=SPARSE, h=8, g=2, d=d, e=d, dtype=dtype, page_size=64)
      for d in (64, 256) for dtype in (torch.float16, torch.float32)),
    *(DecodeCase(lengths=(3000, 1500), config=SPARSE, dtype=torch.bfloat16, h=32, g=2, d=64, e=64, family=family)
      for family in ("peaked", "near_uniform", "tied", "correlated")),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_is_within_the_budget(case: DecodeCase, monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned_memory(monkeypatch)
    check_attention(case, "cuda")


APPENDS = [
    *(
        (DecodeCase(lengths=BOUNDARIES, config=replace(DEFAULT, compression=kind), page_size=256, **BF16), None)
        for kind in ("mean", "linear", "mlp")
    ),
    (DecodeCase(lengths=(7, 16, 47, 64, 96, 3), t=16, config=SMALL, page_size=32, **BF16), (7, 16, 15, 0, 16, 1)),
    (DecodeCase(lengths=(7, 16, 47, 64, 96, 3), t=16, config=ODD, **BF16), (7, 16, 15, 0, 16, 1)),
    *((DecodeCase(lengths=(32, 48, 50), config=DEFAULT, dtype=dtype, h=8, g=2, d=d, e=e), None)
      for dtype, d, e in ((torch.float32, 128, 64), (torch.float32, 256, 256), (torch.float16, 80, 96),
                          (torch.bfloat16, 192, 128), (torch.bfloat16, 256, 256))),
]  # fmt: skip


@pytest.mark.parametrize(("case", "counts"), APPENDS, ids=str)
def test_append_is_within_the_budget(case: DecodeCase, counts: tuple[int, ...] | None, monkeypatch) -> None:
    poisoned_memory(monkeypatch)
    check_append(case, counts or tuple(min(1, length) for length in case.lengths), "cuda")


# ---- the same bits -------------------------------------------------------------------------------------------------

LENGTHS = (9001, 0, 64, 2500, 700, 4096)
WHOLE = DecodeCase(lengths=LENGTHS, config=DEFAULT, dtype=torch.bfloat16, h=32, g=2, d=128, e=128)


def attention(scene: Scene, tensors: CacheTensors, rows: slice = slice(None)) -> Tensor:
    return decode_attention(scene.q[rows], scene.gates[rows], tensors, scene.case.config, backend="triton")


def of_rows(tensors: CacheTensors, rows: slice) -> CacheTensors:
    """The cache of some of the rows, their pages where they were."""
    own = ("k_win", "v_win", "k_raw", "v_raw", "block_table", "lengths", "arrivals")
    return replace(tensors, **{name: getattr(tensors, name)[rows].contiguous() for name in own})


@pytest.mark.parametrize("longest", [1000, 40001])  # the second has more blocks than one step of scoring takes
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["q", "k", "v", "k_cmp", "v_cmp"])
def test_what_is_not_finite_stays_in_its_row(name: str, value: float, longest: int) -> None:
    check_not_finite(DecodeCase(lengths=(longest, 333), config=SPARSE, page_size=64, **BF16), name, value, "cuda")


@pytest.mark.parametrize("t", [1, 3])
def test_a_row_does_not_depend_on_its_batch(t: int) -> None:
    scene = Scene(replace(WHOLE, t=t), "cuda")
    tensors = scene.cache(LENGTHS)
    together = attention(scene, tensors)
    for row in range(len(LENGTHS)):
        alone = slice(row, row + 1)
        assert torch.equal(attention(scene, of_rows(tensors, alone), alone), together[alone])


def test_a_long_row_alone_does_as_in_a_batch_that_fills_the_device() -> None:
    # Alone, its programs wait for each other and score blocks together; in the batch, programs have several shares.
    lengths = (40000, 0, 64, 2500, 700, 17000) * 4
    case = DecodeCase(lengths=lengths, config=DEFAULT, dtype=torch.bfloat16, h=16, g=4, d=64, e=64)
    scene = Scene(case, "cuda")
    tensors = scene.cache(lengths)
    together = attention(scene, tensors)
    for row in range(6):
        alone = slice(row, row + 1)
        for _ in range(5):
            assert torch.equal(attention(scene, of_rows(tensors, alone), alone), together[alone]), row


def test_it_repeats_bit_by_bit_and_pages_and_room_change_nothing() -> None:
    scene = Scene(WHOLE, "cuda")
    tensors = scene.cache(LENGTHS)
    first = attention(scene, tensors)
    for _ in range(20):
        assert torch.equal(attention(scene, tensors), first)
    for page_size in (64, 256):
        paged = Scene(replace(WHOLE, page_size=page_size, room=5000), "cuda")
        assert torch.equal(attention(paged, paged.cache(LENGTHS)), first)


@pytest.mark.parametrize("page_size", [None, 64])
def test_replays_of_a_graph_are_the_steps_one_by_one(page_size: int | None) -> None:
    start, steps = (1000, 0, 63, 250, 500), 140
    after = tuple(length + steps * (length > 0) for length in start)
    case = DecodeCase(lengths=after, config=DEFAULT, dtype=torch.bfloat16, h=16, g=2, d=64, e=64, page_size=page_size)
    scene = Scene(case, "cuda")
    counts = tuple(int(length > 0) for length in start)

    def given(step: int) -> dict:
        now = tuple(length + step * count for length, count in zip(start, counts, strict=True))
        return scene.new_tokens(now, 1, counts, True)

    def step_of(tensors: CacheTensors, arguments: dict) -> Tensor:
        append_tokens(tensors, **append_arguments(arguments), backend="triton")
        cos, sin = arguments["cos"], arguments["sin"]
        return decode_attention(scene.q, scene.gates, tensors, DEFAULT, cos=cos, sin=sin, backend="triton")

    graphed, eager = (scene.cache(start) for _ in range(2))
    held = given(0)
    step_of(scene.cache(start), held)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step_of(graphed, held)
    for step in range(steps):
        new = given(step)
        for name, x in held.items():
            if isinstance(x, Tensor):
                x.copy_(new[name])
        graph.replay()
        assert torch.equal(out, step_of(eager, new)), step
    assert graphed.lengths.tolist() == list(after)
    for name in MEMORY:
        assert torch.equal(getattr(graphed, name), getattr(eager, name)), name


def test_padding_columns_of_counts_give_zero() -> None:
    scene = Scene(replace(WHOLE, t=4), "cuda")
    tensors = scene.cache(LENGTHS)
    counts = torch.tensor([4, 0, 1, 3, 0, 2], dtype=torch.int32, device="cuda")
    whole = attention(scene, tensors)
    found = decode_attention(scene.q, scene.gates, tensors, DEFAULT, counts=counts, backend="triton")
    padding = torch.arange(4, device="cuda") < 4 - counts[:, None]
    assert torch.equal(found, whole.masked_fill(padding[:, :, None, None], 0.0))


def test_torch_compile_takes_a_step_whole() -> None:
    case = DecodeCase(lengths=(500, 64), config=DEFAULT, **BF16)
    scene = Scene(case, "cuda")
    before = (499, 63)

    def step(tensors: CacheTensors, arguments: dict) -> Tensor:
        append_tokens(tensors, **arguments, backend="triton")
        return decode_attention(scene.q, scene.gates, tensors, DEFAULT, backend="triton")

    one, other = scene.cache(before), scene.cache(before)
    arguments = append_arguments(scene.new_tokens(before, 1, (1, 1), True))
    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(one, arguments), step(other, arguments))
