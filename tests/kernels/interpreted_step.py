"""The products and norms of a decoding step in Triton's interpreter; `test_interpreter_decoding.py` runs this file."""

import fast_interpreter  # noqa: F401
import pytest
import torch
from moved import moved
from poison import poisoned_memory
from step_checks import USES, check_begin, check_project, check_rms_norm

from nsa.backend import use_backend
from nsa.kernels import step as kernels
from nsa.models import NSALlamaCache, NSALlamaConfig, NSALlamaForCausalLM
from nsa.models.captured_step import CapturedStep
from nsa.testing import assert_close_to_fp64

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned_memory(monkeypatch)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(("rows", "width", "columns"), [(1, 48, 16), (3, 528, 33), (11, 256, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_product_is_within_the_budget(use: str, rows: int, width: int, columns: int, dtype: torch.dtype) -> None:
    check_project(rows, width, columns, use, dtype, "cpu")


@pytest.mark.parametrize(("rows", "width"), [(1, 48), (3, 520)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_norms_are_within_the_budget(rows: int, width: int, dtype: torch.dtype) -> None:
    check_rms_norm(rows, width, dtype, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("t", "counts"), [(1, None), (1, (0, 1, 1, 1)), (6, (6, 0, 3, 1))])
def test_a_step_begins_within_the_budget(t: int, counts: tuple[int, ...] | None, dtype: torch.dtype) -> None:
    check_begin((0, 3, 64, 70001), t, counts, dtype, "cpu")


def test_what_the_kernels_are_meant_for() -> None:
    assert kernels.serves(torch.zeros(16, 32, dtype=torch.bfloat16))
    assert not kernels.serves(torch.zeros(17, 32, dtype=torch.bfloat16))
    assert not kernels.serves(torch.zeros(0, 32, dtype=torch.float16))
    assert not kernels.serves(torch.zeros(1, 32))
    assert not kernels.serves(torch.zeros(1, 40, dtype=torch.float16))


@torch.no_grad()
def test_a_step_of_the_model_is_that_of_the_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    config = NSALlamaConfig(
        vocab_size=50, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, attention_bias=True, initializer_range=0.2,
        nsa={"compress_block_size": 4, "compress_stride": 2, "select_block_size": 8, "num_selected_blocks": 4,
             "window_size": 6},
    )  # fmt: skip
    model, ids = NSALlamaForCausalLM(config).eval().half(), torch.randint(50, (2, 36))
    moved(model, 0.1)
    calls = []
    for name in ("project", "rms_norm"):
        kernel = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, kernel=kernel, **k: calls.append(1) or kernel(*a, **k))
    cache = NSALlamaCache(config, layout="static", max_length=64)
    with use_backend("torch"):
        model(ids[:, :32], past_key_values=cache)
    decoder = CapturedStep(model, cache, masked=False, capture=False)
    found = torch.cat([decoder(ids[:, at : at + 1]) for at in range(32, 36)], dim=1)
    assert len(calls) == 4 * (2 * 6 + 1)
    with use_backend("torch"):
        plain = model(ids, use_cache=False).logits[:, 32:]
        truth = model.double()(ids, use_cache=False).logits[:, 32:]
    assert_close_to_fp64(found, plain, truth, largest_score=100.0)
