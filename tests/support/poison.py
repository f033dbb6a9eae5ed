"""Memory that the kernels get is filled with NaN first, so that a row they do not write shows."""

from typing import Any

import pytest
import torch

_INTEGER = -(1 << 20)


def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *sizes, **kwargs: _poison(empty(*sizes, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda x, **kwargs: _poison(empty_like(x, **kwargs)))


def _poison(x: Any) -> Any:
    if isinstance(x, torch.Tensor) and type(x) is torch.Tensor and not x.is_meta:
        return x.fill_(torch.nan if x.is_floating_point() else _INTEGER if x.dtype != torch.bool else 1)
    return x
