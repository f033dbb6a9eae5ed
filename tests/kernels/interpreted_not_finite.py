"""What the kernels make of NaN and infinity, in Triton's interpreter; `test_interpreter.py` runs this file.

They promise less than the operations (docs/kernels.md): it reaches every query that sees it, may reach others of the
same sequence and KV head, and none else. The selection has its forced blocks whatever the scores are.
"""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

TESTS = Path(__file__).parents[1]
sys.path += [str(TESTS), str(TESTS / "gpu")]

from decoding import DecodeCase, Scene
from layouts import Layout
from poison import poisoned_memory

from nsa.config import NSAConfig
from nsa.decoding import decode_attention
from nsa.functional import native_sparse_attention
from nsa.kernels import decode

SMALL = NSAConfig(
    compress_block_size=4, compress_stride=2, select_block_size=8, num_selected_blocks=4, window_size=6,
    compression="mean",
)  # fmt: skip
LAYOUTS = {
    "rows": Layout(b=2, t=13, s=21),
    "packed": Layout(t=20, s=20, cu_seqlens_q=(0, 13, 13, 20)),
    "ragged": Layout(b=2, t=5, s=25, seqlens_k=(25, 3)),
}
VALUES = [torch.nan, torch.inf, -torch.inf]

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value", "ignore:overflow")  # numpy


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned_memory(monkeypatch)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_reaches_all_that_see_it_and_no_other_sequence_and_kv_head(layout: str, name: str, value: float) -> None:
    layout, generator = LAYOUTS[layout], torch.Generator().manual_seed(0)
    shapes = {"q": (layout.t, 4, 8), "k": (layout.s, 2, 8), "v": (layout.s, 2, 8), "gates": (layout.t, 4, 3)}
    clean = {x: torch.randn(layout.b, *shape, generator=generator) for x, shape in shapes.items()}
    spoiled = clean | {name: clean[name].clone()}
    spoiled[name][0, 4, -1, 1] = value  # of the first sequence, the last head and KV head

    def found(tensors: dict[str, Tensor], backend: str) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in tensors.values()]
        out = native_sparse_attention(*leaves, SMALL, **layout.lengths(), backend=backend)
        # A loss that leaves out the queries that the operations find spoiled.
        d_out = torch.ones_like(out) if backend == "torch" else torch.ones_like(out).masked_fill(spoilt, 0.0)
        return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]

    spoilt = torch.zeros(())
    truth = found(spoiled, "torch")
    spoilt = ~truth[0].isfinite()
    assert spoilt.any()
    found_clean, actual = (found(tensors, "triton") for tensors in (clean, spoiled))
    assert not actual[0][spoilt].isfinite().any(), "hidden from queries that see it"
    first = layout.members(SMALL)[0]
    for part, before, after in zip(("out", "dq", "dk", "dv", "dgates"), found_clean, actual, strict=True):
        own = torch.zeros_like(before, dtype=torch.bool)
        (first.keys if part in ("dk", "dv") else first.queries)(own)[:, :, own.shape[2] // 2 :] = True
        assert torch.equal(before[~own], after[~own]), part


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("name", ["q", "k", "v", "k_cmp", "v_cmp"])
@pytest.mark.parametrize("plan", [
    decode.PLAN,
    # The steps that longer caches take.
    replace(decode.PLAN, block_n=16, least_tiles=1, splits=4, chunk=4, select_blocks=4),
], ids=["few blocks", "many"])  # fmt: skip
def test_decoding_it_reaches_all_that_see_it_and_no_other_row(
    plan: decode.Plan, name: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "PLAN", plan)
    scene = Scene(DecodeCase(lengths=(66, 63), config=SMALL, h=2, g=1, d=8, e=8))
    given = scene.q, scene.gates, scene.cache((66, 63)), SMALL
    clean, _ = decode.attend(*given, scene.scale)
    if name.endswith("_cmp"):
        scene.__dict__[name] = getattr(scene, name).clone()
    getattr(scene, name)[0, 0 if name == "q" else 20, -1, 1] = value
    given = scene.q, scene.gates, scene.cache((66, 63)), SMALL
    out, picks = decode.attend(*given, scene.scale)
    # One query sees all that its programs read, so it is no more than the operations find.
    assert torch.equal(out[0].isfinite(), decode_attention(*given, backend="torch")[0].isfinite())
    assert torch.equal(out[1], clean[1])
    chosen = picks[0, 0, 0].tolist()
    assert chosen == sorted(set(chosen))
    assert {0, 7, 8} < set(chosen) <= set(range(9))
