"""The decoding kernels on the CPU, in Triton's interpreter; `test_interpreter_decoding.py` runs this file.

As in interpreted.py, sizes are tiny. Programs run one after another here, so the last one to arrive is always the same;
what another order does is left to `tests/gpu`.
"""

from dataclasses import replace

import fast_interpreter  # noqa: F401
import pytest
import torch
from decode_checks import check_append, check_attention
from decoding import DecodeCase, Scene, append_arguments, window_in_pages
from poison import poisoned_memory
from serving.engine import CONFIG, Engine, Row, Text, variants
from serving.fixed import Fixed

from nsa.backend import Backend, use_backend
from nsa.cache_tensors import CacheTensors
from nsa.config import NSAConfig
from nsa.decoding import append_tokens, decode_attention
from nsa.kernels import decode
from nsa.ops import decode as ops
from nsa.testing import assert_close_to_fp64

SMALL = NSAConfig(
    compress_block_size=4, compress_stride=2, select_block_size=8, num_selected_blocks=4, window_size=6,
    compression="mean",
)  # fmt: skip
ODD = NSAConfig(
    compress_block_size=6, compress_stride=2, select_block_size=6, num_selected_blocks=3, window_size=5,
    compression="linear", shared_kv=True,
)  # fmt: skip
FLAT = NSAConfig(compress_block_size=8, compress_stride=8, select_block_size=8, num_selected_blocks=3, window_size=9)
SIZES = {"h": 3, "g": 1, "d": 24, "e": 8}

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned_memory(monkeypatch)


@pytest.mark.parametrize("case", [
    DecodeCase(lengths=(1, 2, 5, 31, 32, 33, 0, 70), config=SMALL, page_size=16, **SIZES),
    DecodeCase(lengths=(70, 12, 3), t=3, config=SMALL, dtype=torch.float16, **SIZES),
    DecodeCase(lengths=(61, 48), t=2, config=ODD, page_size=48, h=4, g=2, d=8, e=16),
    DecodeCase(lengths=(61, 7), config=FLAT, **SIZES),
    DecodeCase(lengths=(66,), config=SMALL, h=2, g=1, d=8, e=8, family="tied"),
    DecodeCase(lengths=(9, 2), t=16, config=SMALL, h=32, g=1, d=8, e=8),
], ids=str)  # fmt: skip
def test_attention_is_within_the_budget(case: DecodeCase) -> None:
    check_attention(case, "cpu")


def test_many_splits_and_steps_of_the_top_n(monkeypatch: pytest.MonkeyPatch) -> None:
    # With runs of one tile and steps of 64 blocks, 600 tokens are what 40,000 are otherwise.
    plan = replace(decode.PLAN, block_n=16, least_tiles=1, splits=4, chunk=16, select_blocks=16)
    monkeypatch.setattr(decode, "PLAN", plan)
    config = replace(SMALL, num_selected_blocks=5)
    check_attention(DecodeCase(lengths=(600, 299), config=config, h=2, g=1, d=8, e=8), "cpu")


@pytest.mark.parametrize("page_size", [None, 16])
def test_a_window_in_pages_is_one_in_rings_bit_by_bit(page_size: int | None) -> None:
    case = DecodeCase(lengths=(40, 0, 9), config=SMALL, page_size=page_size, h=2, g=1, d=8, e=8)
    scene = Scene(case)
    rings = scene.cache(case.lengths)
    pages = window_in_pages(rings)
    for attend in (decode.decode_attention, ops.decode_attention):
        expected = attend(scene.q, scene.gates, rings, SMALL, scale=scene.scale)
        assert torch.equal(attend(scene.q, scene.gates, pages, SMALL, scale=scene.scale), expected)


def test_an_engine_s_steps_are_within_the_budget() -> None:
    found, plain = (engine_rows(backend) for backend in ("triton", "torch"))
    for row, other in zip(found, plain, strict=True):
        actual, reference = (torch.stack(x.out) for x in (row, other))
        assert_close_to_fp64(actual, reference, row.text.truth(), largest_score=20.0)


def engine_rows(backend: Backend) -> list[Row]:
    """Two rows over shuffled blocks, NaN where nothing was written, and few tokens more on this backend."""
    rows = [Row(Text(42)), Row(Text(4, seed=1))]
    engine = Engine(dtype=torch.float32)
    with use_backend("torch"):
        engine.step([(rows[0], 39)])
    with use_backend(backend):
        for counts in ((1, 3), (2, 1)):
            engine.step(list(zip(rows, counts, strict=True)), padding=1)
    return rows


@pytest.mark.parametrize(("config", "t"), [(CONFIG, 3), (variants()[1], 1)], ids=str)
def test_decoding_steps_over_block_tables_are_within_the_budget(config: NSAConfig, t: int) -> None:
    found, plain = (fixed_rows(config, t, backend) for backend in ("triton", "torch"))
    for row, other in zip(found, plain, strict=True):
        actual, reference = (torch.stack(x.out) for x in (row, other))
        assert_close_to_fp64(actual, reference, row.text.truth(), largest_score=20.0)


def fixed_rows(config: NSAConfig, t: int, backend: Backend) -> list[Row]:
    """Rows that begin with their first block, and that complete one while the engine's blocks change."""
    starts = (5, 30) if t > 1 else (7, 31)
    rows = [Row(Text(start + 2 * t, config, seed=start)) for start in starts]
    engine = Engine(config, dtype=torch.float32)
    with use_backend("torch"):
        engine.step([(row, start) for row, start in zip(rows, starts, strict=True) if start])
    fixed = Fixed(engine, 3, t, 4, rows[0].text.phi)
    with use_backend(backend):
        for _ in range(2):
            fixed.step(rows)
    return rows


@pytest.mark.parametrize("together", [2, 4])
def test_programs_of_several_shares_change_no_bit(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(DecodeCase(lengths=(70, 0, 9, 33, 2), t=2, config=SMALL, page_size=16, h=6, g=2, d=8, e=16))
    tensors = scene.cache(scene.case.lengths)
    alone, _ = decode.attend(scene.q, scene.gates, tensors, SMALL, scene.scale)
    monkeypatch.setattr(decode, "PLAN", replace(decode.PLAN, together=together))
    monkeypatch.setattr(decode, "multiprocessors", lambda device: 1)
    found, _ = decode.attend(scene.q, scene.gates, tensors, SMALL, scene.scale)
    assert torch.equal(found, alone)


def test_ties_go_to_the_lower_block() -> None:
    case = DecodeCase(lengths=(66,), config=SMALL, h=2, g=1, d=8, e=8, family="tied")
    scene = Scene(case)
    # Equal keys: blocks inside the visible past tie, the last one scores less. Block 0 and two local ones are forced.
    scene.__dict__["k_cmp"] = scene.k_raw[:, :32]
    _, picks = decode.attend(scene.q, scene.gates, scene.cache((66,)), SMALL, scene.scale)
    assert picks[0, 0, 0].tolist() == [0, 1, 7, 8]


@pytest.mark.parametrize("rotate_inside", [False, True])
@pytest.mark.parametrize(("case", "counts"), [
    (DecodeCase(lengths=(1, 3, 4, 16, 17, 48), config=SMALL, page_size=16, **SIZES), (1, 0, 1, 1, 1, 1)),
    (DecodeCase(lengths=(7, 20, 33), t=7, config=replace(SMALL, compression="mlp"), page_size=16, **SIZES), (7, 0, 5)),
    (DecodeCase(lengths=(7, 20, 33), t=7, config=ODD, h=4, g=2, d=8, e=16), (7, 3, 5)),
    (DecodeCase(lengths=(8, 16), config=FLAT, dtype=torch.float16, **SIZES), (1, 1)),
], ids=str)  # fmt: skip
def test_append_is_within_the_budget(case: DecodeCase, counts: tuple[int, ...], rotate_inside: bool) -> None:
    check_append(case, counts, "cpu", rotate_inside)


def test_tokens_without_room_are_not_written() -> None:
    scene = Scene(DecodeCase(lengths=(16, 9), config=SMALL, page_size=16, **SIZES))
    tensors, before = scene.cache((16, 9)), scene.cache((16, 9))
    append_tokens(tensors, **append_arguments(scene.new_tokens((16, 9), 1, (1, 1), True)), backend="triton")
    k = tensors.k.clone()
    page = int(tensors.block_table[1, 0])
    assert not torch.equal(k[page, 9], before.k[page, 9])
    k[page, 9] = before.k[page, 9]
    assert torch.equal(k, before.k)


def test_the_function_takes_the_kernels_and_says_why_it_cannot() -> None:
    case = DecodeCase(lengths=(20, 3), t=2, config=SMALL, **SIZES)
    scene = Scene(case)
    tensors = scene.cache(case.lengths)
    counts = torch.tensor([2, 1], dtype=torch.int32)
    found, plain = (
        decode_attention(scene.q, scene.gates, tensors, SMALL, counts=counts, backend=backend)
        for backend in ("triton", "torch")
    )
    torch.testing.assert_close(found, plain)
    assert torch.equal(found, decode_attention(scene.q, scene.gates, tensors, SMALL, counts=counts))
    with pytest.raises(ValueError, match=r"expected at most \d+ queries, got 17"):
        decode.decode_attention(
            scene.q[:, :1].expand(2, 17, 3, 24), scene.gates[:, :1].expand(2, 17, 3, 3), tensors, SMALL
        )
    many = scene.new_tokens((0, 0), 99, (20, 3), True)
    with pytest.raises(ValueError, match=r"append_tokens: expected at most \d+ tokens at a time"):
        decode.append_tokens(tensors, **append_arguments(many))


def test_the_operators_are_registered_right() -> None:
    case = DecodeCase(lengths=(9, 4), config=SMALL, **SIZES)
    scene = Scene(case)
    tensors = scene.cache((8, 3))
    given = scene.new_tokens((8, 3), 1, (1, 1), True)

    def step(tensors: CacheTensors) -> torch.Tensor:
        append_tokens(tensors, **append_arguments(given), backend="triton")
        return decode_attention(scene.q, scene.gates, tensors, SMALL, backend="triton")

    other = scene.cache((8, 3))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(other), step(tensors))
    torch.testing.assert_close(other.k, tensors.k)
