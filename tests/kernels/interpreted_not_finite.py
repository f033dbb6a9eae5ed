"""What the kernels make of NaN and infinity, in Triton's interpreter; `test_interpreter.py` runs this file.

They promise less than the operations (docs/kernels.md): it reaches every query that sees it, may reach others of the
same sequence and KV head, and none else. The selection has its forced blocks whatever the scores are.
"""

from dataclasses import replace

import fast_interpreter  # noqa: F401
import pytest
import torch
from decode_checks import check_not_finite
from decoding import DecodeCase
from layouts import Layout
from poison import poisoned_memory
from torch import Tensor

from nsa.config import NSAConfig
from nsa.functional import native_sparse_attention
from nsa.kernels import decode, library

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
    clean, tensors = _inputs(), _inputs()
    tensors["v"][0, 4, -1, 1] = torch.nan
    found, truth = _attend(tensors, "triton"), _attend(tensors, "torch").isfinite()
    assert not truth.all()
    assert not found[~truth].isfinite().any()
    assert torch.equal(_others(found), _others(_attend(clean, "triton")))


def test_gradients_of_another_sequence_and_kv_head_stay_as_they_were() -> None:
    results, cu_seqlens = [], PACKED.lengths()["cu_seqlens_q"]
    for value in (0.0, torch.nan):
        leaves = list(_inputs().values())[:3]
        leaves[2][0, 4, -1, 1] = value
        leaves = [x.requires_grad_() for x in leaves]
        out, _ = library.contiguous_attention(*leaves, cu_seqlens, None, None, PACKED.s, 1, 1, 6, 0.3)
        results.append(torch.autograd.grad(out.sum(), leaves))
    assert not results[1][0].isfinite().all()
    for name, before, after in zip("qkv", *results, strict=True):
        assert torch.equal(_others(before), _others(after)), name


# The steps that longer caches take.
MANY = replace(decode.PLAN, block_n=16, least_tiles=1, splits=4, chunk=4, select_blocks=4)


@pytest.mark.parametrize(
    ("plan", "name"), [(decode.PLAN, "q"), (decode.PLAN, "v"), (decode.PLAN, "k_cmp"), (MANY, "k_cmp")]
)
def test_decoding_it_reaches_all_that_see_it_and_no_other_row(
    plan: decode.Plan, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "PLAN", plan)
    check_not_finite(DecodeCase(lengths=(66, 63), config=SMALL, h=2, g=1, d=8, e=8), name, torch.nan, "cpu")
