"""Sizes of tiles by kernel, head width, dtype and the device's shared memory: a table, no run-time tuning.

For each kernel the candidates are tried in order and the first that fits the device is taken, so one table serves an
A100 (163 KB a program), an L4 or 4090 (99 KB) and an H100, H200 or B200 (227 KB). Sequence lengths play no part.
"""

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from nsa.kernels.integers import next_power_of_2
from nsa.kernels.layout import PACKED, Layout

# Rows (queries x heads), keys, warps, software-pipelining stages.
Candidate = tuple[int, int, int, int]

# 16-bit inputs, in order of preference; the first column is the largest head width the row is meant for.
TABLE: dict[str, list[tuple[int, Candidate]]] = {
    "contiguous_forward": [
        (128, (128, 128, 8, 3)),
        (128, (128, 64, 8, 3)),
        (192, (128, 64, 8, 3)),
        (256, (128, 64, 8, 2)),
        (256, (64, 64, 4, 2)),
        (256, (64, 32, 4, 2)),
        (256, (64, 16, 4, 2)),
    ],
    "window_forward": [(192, (64, 64, 4, 2))],
    "contiguous_dq": [
        (128, (128, 64, 8, 3)),
        (128, (64, 64, 4, 3)),
        (192, (128, 64, 8, 2)),
        (256, (64, 64, 8, 2)),
        (256, (64, 32, 4, 2)),
        (256, (32, 32, 4, 2)),
        (256, (32, 16, 4, 1)),
    ],
    "window_dq": [(192, (64, 32, 4, 2))],
    "window_dkdv": [(128, (64, 128, 8, 3))],
    "contiguous_dkdv": [
        (128, (64, 128, 8, 3)),
        (128, (32, 128, 8, 3)),
        (128, (32, 64, 4, 3)),
        (192, (32, 128, 8, 3)),
        (256, (32, 64, 8, 2)),
        (256, (32, 32, 4, 2)),
        (256, (16, 32, 4, 1)),
    ],
    "scoring": [
        (128, (64, 128, 4, 3)),
        (192, (64, 128, 4, 2)),
        (128, (128, 128, 8, 3)),
        (256, (128, 64, 8, 2)),
        (256, (64, 64, 4, 2)),
        (256, (64, 32, 4, 2)),
    ],
    "selected_forward": [
        (128, (64, 64, 4, 3)),
        (256, (64, 64, 4, 2)),
        (256, (64, 32, 4, 2)),
        (256, (32, 32, 4, 2)),
    ],
    "selected_parts": [
        (64, (64, 128, 4, 3)),
        (128, (64, 128, 4, 1)),
        (128, (32, 128, 4, 1)),
        (192, (64, 128, 4, 1)),
        (192, (32, 128, 4, 1)),
        (192, (16, 128, 4, 1)),
    ],
    "selected_dq": [
        (128, (64, 64, 4, 2)),
        (256, (64, 32, 4, 2)),
        (256, (32, 32, 4, 2)),
        (256, (32, 16, 4, 1)),
    ],
    # dk, dv and dq's parts of groups of few heads, whose widths are 128 at most
    "selected_gradients": [
        (64, (64, 64, 4, 2)),
        (128, (32, 64, 4, 2)),
        (128, (16, 64, 4, 1)),
    ],
    "selected_dkdv": [
        (128, (64, 64, 4, 2)),
        (128, (32, 64, 4, 3)),
        (128, (32, 64, 4, 2)),
        (192, (64, 64, 8, 3)),
        (192, (64, 32, 4, 2)),
        (192, (32, 32, 4, 2)),
        (256, (32, 64, 8, 2)),
        (256, (32, 32, 4, 2)),
        (256, (16, 32, 4, 1)),
    ],
}
# 32-bit inputs: exact dots on the ordinary units, so small tiles.
TABLE_FP32: list[Candidate] = [(32, 32, 8, 2), (32, 32, 8, 1), (32, 16, 8, 1), (16, 16, 4, 1)]

# Windows are short: many small programs hide their beginnings and ends.
for name in ("forward", "dq", "dkdv"):
    TABLE[f"window_{name}"] += TABLE[f"contiguous_{name}"]


@dataclass(frozen=True)
class Heads:
    """Query heads in groups, and the two head widths, each with its power of two."""

    h: int
    g: int
    d: int
    e: int

    @staticmethod
    def of(q: Tensor, k: Tensor, v: Tensor) -> "Heads":
        return _heads(q.shape[2], k.shape[2], q.shape[3], v.shape[3])

    @cached_property
    def per_group(self) -> int:
        return self.h // self.g

    @cached_property
    def padded_group(self) -> int:
        return next_power_of_2(self.per_group)

    @cached_property
    def padded_d(self) -> int:
        return max(16, next_power_of_2(self.d))

    @cached_property
    def padded_e(self) -> int:
        return max(16, next_power_of_2(self.e))

    @cached_property
    def split_d(self) -> tuple[int, int]:
        """The columns of queries and keys as two powers of two, the second of which may be 0 (`tiles.columns`)."""
        main = self.padded_d // 2
        rest = max(16, next_power_of_2(self.d - main))
        return (self.padded_d, 0) if main < 16 or main + rest >= self.padded_d else (main, rest)

    @cached_property
    def constants(self) -> dict[str, int]:
        return {
            "G": self.per_group,
            "GP": self.padded_group,
            "D": self.d,
            "DP": self.split_d[0],
            "DR": self.split_d[1],
            "E": self.e,
            "EP": self.padded_e,
        }


_heads = lru_cache(Heads)  # what follows from them is worked out once, not at every launch


@dataclass(frozen=True)
class TileSize:
    block_q: int
    block_n: int
    warps: int
    stages: int
    precision: str

    def with_queries(self, block_q: int) -> "TileSize":
        return replace(self, block_q=block_q)

    @cached_property
    def constants(self) -> dict[str, Any]:
        return {
            "BLOCK_Q": self.block_q,
            "BLOCK_N": self.block_n,
            "PRECISION": self.precision,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


def tile_for(kernel: str, heads: Heads, q: Tensor, largest_block_n: int = 1 << 30) -> TileSize:
    """The tile of `kernel` for these heads on q's device; `largest_block_n` where a block of keys is smaller."""
    return choose(kernel, heads, q.element_size(), shared_memory(q.device), largest_block_n)


@lru_cache
def choose(kernel: str, heads: Heads, bytes_each: int, shared: int, largest_block_n: int = 1 << 30) -> TileSize:
    width = sum(heads.split_d) if kernel == "scoring" else max(sum(heads.split_d), heads.padded_e)
    if bytes_each == 4:
        candidates = TABLE_FP32
    else:
        candidates = [candidate for widest, candidate in TABLE[kernel] if width <= widest]
    # scoring has one query head in a tile at a time
    group = 1 if kernel == "scoring" else heads.padded_group
    for candidate in candidates:
        rows, block_n, warps, stages = candidate
        block_n = min(block_n, max(16, next_power_of_2(largest_block_n)))
        if needed(kernel, (rows, block_n, warps, stages), heads, bytes_each) <= shared:
            break
    block_q = max(1, rows // group)
    return TileSize(block_q, block_n, warps, stages, "ieee" if bytes_each == 4 else "tf32")


def needed(kernel: str, candidate: Candidate, heads: Heads, bytes_each: int) -> int:
    """About how many bytes of shared memory a program takes: what stays, and what is loaded ahead."""
    rows, block_n, _, stages = candidate
    d = sum(heads.split_d)
    both = d + heads.padded_e
    stays, streams = {
        "contiguous_forward": (rows * d, block_n * both),
        "selected_forward": (rows * d, block_n * both),
        "selected_parts": (block_n * both, rows * d),
        "contiguous_dq": (rows * both, block_n * both),
        "selected_dq": (rows * both, block_n * both),
        "contiguous_dkdv": (block_n * both, rows * both),
        "selected_dkdv": (block_n * both, rows * both),
        "selected_gradients": (block_n * both + rows * (block_n + d), rows * both),
        "scoring": (block_n * d, rows * d),
    }[kernel.replace("window", "contiguous")]
    return bytes_each * (stays + stages * streams) + 8 * rows * block_n // 4


@lru_cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may take."""
    if device.type != "cuda":
        return 232448
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def as_rows(x: Tensor) -> Tensor:
    """x with its last dimension side by side, as the kernels read it; any other stride will do."""
    return x if x.stride(-1) == 1 else x.contiguous()


@lru_cache
def is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def empty(
    layout: Layout, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device, fill: float = 0.0
) -> Tensor:
    """Room for a result that the kernels write in full; packed lengths are not read, so rows past them get `fill`."""
    if layout.kind == PACKED:
        return torch.full(shape, fill, dtype=dtype, device=device)
    return torch.empty(shape, dtype=dtype, device=device)
