"""Asking for a backend: what is refused, and why."""

import pytest
import torch

from nsa.backend import resolve, use_backend, why_not_triton
from nsa.functional import native_sparse_attention


def _tensors(h: int = 4, d: int = 64, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    return [torch.zeros(1, 5, heads, d, dtype=dtype) for heads in (h, 2, 2)]


def test_tensors_on_the_cpu_are_computed_by_torch() -> None:
    assert resolve(*_tensors()) == "torch"


def test_an_explicit_request_that_cannot_be_met_says_why() -> None:
    with (
        use_backend("triton"),
        pytest.raises(ValueError, match=r"^backend 'triton' cannot serve: .*CUDA device, got cpu$"),
    ):
        resolve(*_tensors())


def test_the_choice_ends_with_its_block() -> None:
    with use_backend("torch"):
        assert resolve(*_tensors()) == "torch"
    assert resolve(*_tensors()) == "torch"


@pytest.mark.usefixtures("without_shape_checks")
def test_a_calls_own_backend_goes_before_the_blocks() -> None:
    q, k, v = _tensors(dtype=torch.float32)
    gates = torch.ones(1, 5, 4, 3)
    with use_backend("triton"):
        assert native_sparse_attention(q, k, v, gates, backend="torch").shape == q.shape
        assert native_sparse_attention(q, k, v, gates, backend="auto").shape == q.shape
    with pytest.raises(ValueError, match=r"^backend 'triton' cannot serve: .*CUDA device, got cpu$"):
        native_sparse_attention(q, k, v, gates, backend="triton")
    with pytest.raises(ValueError, match="'auto', 'torch' or 'triton', got 'cuda'"):
        native_sparse_attention(q, k, v, gates, backend="cuda")


def test_an_unknown_backend_is_an_error() -> None:
    with pytest.raises(ValueError, match="'auto', 'torch' or 'triton', got 'cuda'"), use_backend("cuda"):
        pass


@pytest.mark.parametrize(
    ("tensors", "scale", "reason"),
    [
        (_tensors(dtype=torch.float64), None, "one dtype of float32, bfloat16 or float16"),
        (_tensors(d=60), None, "multiples of 8 up to 256, got 60"),
        (_tensors(d=264), None, "multiples of 8 up to 256, got 264"),
        (_tensors(h=128), None, "at most 32 query heads to a KV head, got 64"),
        (_tensors(), -1.0, "scale > 0, got -1.0"),
        ([x[0] for x in _tensors()], None, "four dimensions, got [3, 3, 3]"),
    ],
    ids=["dtype", "odd width", "wide", "group", "scale", "dimensions"],
)
def test_each_refusal_names_its_reason(
    tensors: list[torch.Tensor], scale: float | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # the device is not the reason here
    assert reason in (why_not_triton(*tensors, scale=scale) or "nothing")
    assert why_not_triton(*_tensors()) is None
