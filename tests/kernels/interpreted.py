"""The kernels on the CPU, in Triton's interpreter; `test_interpreter.py` runs this file in a process of its own.

The interpreter takes about 20 ms a program, so sizes are tiny: every layout, group sizes that are padded, head dims
and block sizes that are no powers of two, ties, empty rows. What it cannot show (bf16, shared memory, races) is left
to `tests/gpu` and `test_compile.py`.
"""

from dataclasses import replace

import pytest
import torch
from cases import CHECKS, Case, Run, whole
from fast_interpreter import few_programs
from layouts import Layout
from poison import poisoned_memory

from nsa.config import NSAConfig
from nsa.kernels import inverse, launch, selected_by_block, selected_gradients
from nsa.kernels.launch import Heads
from nsa.kernels.rows import rowsum_delta
from nsa.kernels.selected_forward import selected_forward
from nsa.modules.rotary import rotate
from nsa.ops.selection import select_blocks
from nsa.testing import assert_close_to_fp64

SMALL = NSAConfig(compress_block_size=4, compress_stride=2, select_block_size=8, num_selected_blocks=4, window_size=6)
ODD = NSAConfig(compress_block_size=6, compress_stride=2, select_block_size=6, num_selected_blocks=4, window_size=5)


torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned_memory(monkeypatch)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_kernel_is_within_the_budget(check: str, dtype: torch.dtype) -> None:
    case = Case(layout=whole(37), config=ODD, dtype=dtype, h=3, g=1, d=24, e=8)
    getattr(Run(case, "cpu"), check)()


@pytest.mark.parametrize("check", ["compressed", "window", "selected", "selection", "whole"])
@pytest.mark.parametrize(("d", "e"), [(192, 128), (96, 64), (40, 8)])  # 128 + 64, 64 + 32, 32 + 8 of 16
def test_widths_that_are_sums_of_two_powers_of_two(d: int, e: int, check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    few_programs(monkeypatch)
    case = Case(layout=whole(21), config=SMALL, dtype=torch.float32, h=2, g=1, d=d, e=e)
    heads = Heads(2, 1, d, e)
    assert heads.split_d[1] > 0
    assert sum(heads.split_d) < heads.padded_d
    getattr(Run(case, "cpu"), check)()


def test_small_groups_of_such_widths_attend_block_by_block() -> None:
    run = Run(Case(layout=whole(21), config=ODD, dtype=torch.float16, h=2, g=1, d=40, e=8), "cpu")
    assert selected_by_block.serves(run.q, Heads.of(run.q, run.k, run.v), run.case.config)
    run.selected()


LAYOUTS_HERE = {
    "suffix": Layout(b=2, t=7, s=33),
    "packed": Layout(t=30, s=30, cu_seqlens_q=(0, 10, 11, 11, 30)),
    "packed suffixes": Layout(t=9, s=46, cu_seqlens_q=(0, 4, 4, 5, 9), cu_seqlens_k=(0, 20, 20, 23, 46)),
    "ragged rows": Layout(b=3, t=6, s=25, seqlens_k=(25, 0, 4)),
    "two tokens": whole(2),
}


@pytest.mark.parametrize("check", ["selection", "whole"])
@pytest.mark.parametrize("name", LAYOUTS_HERE)
def test_every_layout_is_within_the_budget(name: str, check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    few_programs(monkeypatch)
    case = Case(layout=LAYOUTS_HERE[name], config=SMALL, dtype=torch.float32, h=4, g=2, d=8, e=16)
    getattr(Run(case, "cpu"), check)()


@pytest.mark.parametrize("name", LAYOUTS_HERE)
def test_small_groups_attend_block_by_block_in_every_layout(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selected_by_block, "PARTS_BYTES", 4096)  # several passes
    monkeypatch.setattr(selected_by_block, "ITEM_ROWS", 32)  # several work items to a list
    monkeypatch.setattr(selected_gradients, "PARTS_BYTES", 4096)  # a KV head at a time, in pieces of its queries
    monkeypatch.setattr(inverse, "QUERIES_PER_ITEM", (8, 8))
    case = Case(layout=LAYOUTS_HERE[name], config=ODD, dtype=torch.float16, h=6, g=2, d=8, e=24)
    run = Run(case, "cpu")
    assert selected_by_block.serves(run.q, Heads.of(run.q, run.k, run.v), case.config)
    run.selected()


def test_small_groups_take_blocks_of_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(launch.TABLE, "selected_gradients", [(128, (16, 16, 4, 1))])
    launch.choose.cache_clear()
    config = replace(ODD, select_block_size=20)
    Run(Case(layout=whole(50), config=config, dtype=torch.float16, h=3, g=1, d=16, e=8), "cpu").selected()
    launch.choose.cache_clear()


def test_what_shares_a_tile_does_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(layout=whole(66), config=SMALL, dtype=torch.float16, h=4, g=2, d=8, e=8)
    run, found = Run(case, "cpu"), []
    indices = select_blocks(run.q.float(), run.k_cmp.float(), case.config).int()
    for counters, item_rows, size in ((1, 16, 2048), (1 << 14, 512, 1 << 20)):  # lists in another order, other items
        monkeypatch.setattr(selected_by_block, "COUNTERS", counters)
        monkeypatch.setattr(selected_by_block, "ITEM_ROWS", item_rows)
        monkeypatch.setattr(selected_gradients, "PARTS_BYTES", size)
        out, lse = selected_forward(run.q, run.k, run.v, indices, run.raw, case.config, run.scale)
        given = (run.q, run.k, run.v, indices, run.d_out, lse, rowsum_delta(out, run.d_out, None))
        dq, _, _ = selected_gradients.selected_gradients(*given, run.raw, case.config, run.scale)
        found.append((out, lse, dq))
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@pytest.mark.parametrize("rows", [1, 2])
def test_rotation_is_that_of_pytorch(rows: int, generator: torch.Generator) -> None:
    b, t, h, d = 2, 19, 3, 24
    x = torch.randn(b, h, t, d, generator=generator).transpose(1, 2)
    angles = torch.randn(rows, t, d, generator=generator)  # not the same in both halves of a head
    cos, sin = angles.cos(), angles.sin()
    truth, plain = rotate(x.double(), cos.double(), sin.double()), rotate(x, cos, sin)
    with torch.no_grad():
        found = rotate(x, cos, sin)
    assert_close_to_fp64(found, plain, truth, "rotated", largest_score=1.0)


@pytest.mark.parametrize("check", ["compressed", "window", "selected"])
def test_keys_past_a_ragged_row_get_no_gradient(check: str) -> None:
    # 32 heads: tiles of one query, so that a tile of keys past the row's end meets queries that need no mask.
    case = Case(layout=Layout(b=2, t=6, s=60, seqlens_k=(25, 9)), config=SMALL, dtype=torch.float32, h=32, d=8, e=8)
    getattr(Run(case, "cpu"), check)()


@pytest.mark.parametrize("family", ["tied", "near_uniform", "peaked"])
def test_every_family_selects_by_score(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    few_programs(monkeypatch)
    case = Case(layout=whole(66), config=SMALL, dtype=torch.float32, h=2, g=1, d=8, e=8, family=family)
    Run(case, "cpu").selection()


def test_ties_go_to_the_lower_block() -> None:
    run = Run(Case(layout=whole(66), config=SMALL, dtype=torch.float32, h=2, g=1, d=8, e=8, family="tied"), "cpu")
    # Equal keys: blocks inside the visible past tie, the last one scores less. Block 0 and two local ones are forced.
    assert run.block_indices()[0, 64, 0].tolist() == [0, 1, 7, 8]
