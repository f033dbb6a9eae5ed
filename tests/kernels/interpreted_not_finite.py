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
PACKED = Layout(t=12, s=12, cu_seqlens_q=(0, 9, 9, 12))
torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings(
    "ignore:divide by zero", "ignore:invalid value", "ignore:overflow", "ignore:All-NaN"
)  # numpy


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned_memory(monkeypatch)


def _inputs() -> dict[str, Tensor]:
    generator, shapes = torch.Generator().manual_seed(0), {"q": (4, 8), "k": (2, 8), "v": (2, 8), "gates": (4, 3)}
    return {name: torch.randn(1, PACKED.t, *shape, generator=generator) for name, shape in shapes.items()}


def _attend(tensors: dict[str, Tensor], backend: str) -> Tensor:
    return native_sparse_attention(*tensors.values(), SMALL, **PACKED.lengths(), backend=backend)


def _others(x: Tensor) -> Tensor:
    """What is not of the first sequence's last KV head."""
    own = torch.zeros_like(x, dtype=torch.bool)
    own[:, :9, x.shape[2] // 2 :] = True
    return x[~own]


def test_it_reaches_all_that_see_it_and_no_other_sequence_and_kv_head() -> None:
    results = []
    for value in (0.0, torch.nan):
        tensors = _inputs()
        tensors["v"][0, 4, -1, 1] = value
        leaves = [x.requires_grad_() for x in tensors.values()]
        out = _attend(tensors, "triton")
        results.append([out.detach(), *torch.autograd.grad(out.sum(), leaves)])
    truth = _attend(tensors, "torch").isfinite()
    clean, found = results
    assert not truth.all()
    assert not found[0][~truth].isfinite().any()
    assert not found[1].isfinite().all()
    for name, before, after in zip(("out", "dq", "dk", "dv", "dgates"), clean, found, strict=True):
        assert torch.equal(_others(before), _others(after)), name


# The steps that longer caches take.
MANY = replace(decode.PLAN, block_n=16, least_tiles=1, splits=4, chunk=4, select_blocks=4)


@pytest.mark.parametrize(
    ("plan", "name", "value"),
    [
        *((decode.PLAN, name, torch.nan) for name in ("q", "k", "v", "k_cmp", "v_cmp")),
        (decode.PLAN, "k_cmp", torch.inf), (MANY, "k_cmp", torch.nan),
    ],
)  # fmt: skip
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
