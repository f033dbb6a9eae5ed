"""When the kernels for Hopper are taken; what they compute is checked on a GPU, with all others."""

import pytest
import torch

from nsa.kernels import hopper, launch
from nsa.kernels.launch import Heads

K = torch.zeros(1, 64, 4, 128, dtype=torch.bfloat16)
Q = torch.zeros(1, 64, 64, 128, dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def _on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "is_hopper", lambda device: True)


def serves(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, select: int = 64, per_block: int = 4) -> list[bool]:
    heads = Heads.of(q, k, v)
    return [
        hopper.serves_compressed(q, k, v, heads),
        hopper.serves_selected(q, k, v, heads, select),
        hopper.serves_scoring(q, k, heads, per_block),
    ]


@pytest.mark.parametrize(("d", "e"), [(64, 64), (128, 128), (192, 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_they_serve_what_is_most_often_asked_for(dtype: torch.dtype, d: int, e: int) -> None:
    q, k, v = torch.zeros(1, 64, 64, d, dtype=dtype), *(torch.zeros(1, 64, 4, x, dtype=dtype) for x in (d, e))
    assert serves(q, k, v) == [True, True, True]


def test_they_leave_the_rest_to_the_plain_kernels() -> None:
    strided = K.transpose(1, 2).contiguous().transpose(1, 2)
    assert serves(Q.float(), K.float(), K.float()) == [False] * 3
    assert serves(Q[..., :96], K[..., :96], K[..., :96]) == [False] * 3
    assert serves(Q, K, K[..., :64].contiguous()) == [False, False, True]  # scoring reads no values
    assert serves(Q, strided, strided) == [False, False, True]  # scoring copies queries, not keys
    assert serves(Q[:, :, :16].contiguous(), K, K) == [True, False, True]  # 4 heads to a group
    assert serves(Q, K, K, select=48, per_block=3) == [True, False, False]
    assert serves(Q[:, :0], K[:, :0], K[:, :0]) == [False] * 3


def test_other_devices_have_the_plain_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "is_hopper", lambda device: False)
    assert serves(Q, K, K) == [False] * 3
