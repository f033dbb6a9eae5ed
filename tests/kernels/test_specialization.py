"""What a decoding kernel is compiled for: the sizes of model and layout, never the room of a cache. Nothing runs."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from triton.runtime import JITFunction

from nsa.cache_tensors import CacheTensors, Pages, empty_cache_tensors
from nsa.config import NSAConfig
from nsa.decode_step import DecodeStep
from nsa.kernels import decode, launch

CONFIG, B, H, G, D = NSAConfig(), 3, 16, 4, 64


@pytest.fixture
def compiled_for(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """By kernel, what Triton would compile the last launch for."""
    found: dict[str, Any] = {}

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        values = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        key = {name: value for name, value in kwargs.items() if name not in self.arg_names}  # warps, registers
        for parameter in self.params:
            value = values[parameter.name]
            key[parameter.name] = value if parameter.is_constexpr else kind(value, not parameter.do_not_specialize)
        found[self.fn.__name__] = key

    def kind(value: Any, special: bool) -> Any:
        if isinstance(value, tuple):
            return tuple(kind(x, special) for x in value)
        if isinstance(value, torch.Tensor):
            return value.dtype
        if isinstance(value, int):
            wide = "i64" if abs(value) >= 2**31 else "i32"
            return (wide, value == 1, value % 16 == 0) if special else wide
        return value if value is None else type(value)

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(launch, "shared_memory", lambda device: 232448)
    return found


def step(length: int, page_size: int | None) -> None:
    """Launches an append and the attention over a cache with room for so many tokens."""
    size = page_size or length
    per_row = -(-length // size)
    pages = Pages(num_pages=B * per_row, page_size=size, pages_per_row=per_row)
    tensors: CacheTensors = empty_cache_tensors(
        CONFIG, pages, rows=B, num_kv_heads=G, head_dim=D, v_head_dim=D, max_new=1, max_crop=0,
        dtype=torch.bfloat16, device="meta",
    )  # fmt: skip

    def tensor(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    wide = CONFIG.compress_block_size * D
    phi = [tensor(CONFIG.compress_block_size, D), tensor(2 * D, wide), tensor(2 * D), tensor(D, 2 * D), tensor(D)]
    factors = tensor(B, 1, D)
    new = [tensor(B, 1, G, D) for _ in range(6)]
    decode.append(tensors, new, CONFIG, "mlp", (phi, phi), DecodeStep(None, factors, factors, factors, factors))
    decode.attend(tensor(B, 1, H, D), tensor(B, 1, H, 3), tensors, CONFIG, 0.1, None, factors, factors)


@pytest.mark.parametrize("page_size", [None, 256])
def test_a_cache_of_another_length_compiles_nothing_again(page_size: int | None, compiled_for: dict[str, Any]) -> None:
    step(1024, page_size)
    expected = dict(compiled_for)
    assert expected.keys() == {"decode_append_kernel", "decode_split_kernel", "decode_finish_kernel"}
    for length in (1088, 8192, 65600, 1 << 20):
        step(length, page_size)
        assert compiled_for == expected, length
