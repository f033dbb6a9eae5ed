"""Which sequence of a packed batch a tile belongs to, in one launch.

Grid (tiles / TILES). Each program passes over the sequences up to its last tile; none waits for another.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.kernels.integers import cdiv
from nsa.kernels.start import start_kernel

TILES, SEQUENCES = 128, 128


@triton.jit(do_not_specialize=["sequences", "count", "size", "more"])
def tile_map_kernel(
    starts, tile_sequence, tile_first, sequences, count, size, more, TILES: tl.constexpr, SEQUENCES: tl.constexpr
):  # fmt: skip
    first_tile = tl.program_id(0) * TILES
    tile = first_tile + tl.arange(0, TILES)
    # How many sequences end at or before a tile, which is the number of the one it lies in.
    before = tl.zeros([TILES], tl.int32)
    total = first_tile * 0
    first = 0 * sequences
    is_last = tl.program_id(0) == tl.num_programs(0) - 1
    while (first < sequences) & ((total < first_tile + TILES) | is_last):
        sequence = first + tl.arange(0, SEQUENCES)
        mask = sequence < sequences
        rows = tl.load(starts + sequence + 1, mask=mask, other=0) - tl.load(starts + sequence, mask=mask, other=0)
        tiles = tl.where(mask, tl.maximum(rows + more, 0) // size, 0)
        ends = total + tl.cumsum(tiles, 0)
        if is_last:
            tl.store(tile_first + sequence + 1, ends, mask=mask)
        total += tl.sum(tiles, 0)
        if total <= first_tile:
            before += tl.minimum(sequences - first, SEQUENCES)
        else:
            is_before = (ends[None, :] <= tile[:, None]) & mask[None, :]
            before += tl.sum(is_before.to(tl.int32), 1)
        first += SEQUENCES
    if is_last:
        tl.store(tile_first, 0)
    # Tiles past the end belong to the last sequence, where there is nothing at their number.
    tl.store(tile_sequence + tile, tl.minimum(before, sequences - 1), mask=tile < count)


def tile_map(starts: Tensor, count: int, size: int) -> tuple[Tensor, Tensor]:
    """For starts int32 [sequences + 1]: whose each of `count` tiles of `size` rows is; first tiles."""
    return _map(starts, count, size, size - 1)


def block_starts(starts: Tensor, block: int, stride: int) -> Tensor:
    """Where each sequence's compressed blocks begin, int32 [sequences + 1]: (length - block) // stride + 1 of each."""
    return _map(starts, 0, stride, stride - block)[1]


def _map(starts: Tensor, count: int, size: int, more: int) -> tuple[Tensor, Tensor]:
    sequences = len(starts) - 1
    tile_sequence = torch.empty(count, dtype=torch.int32, device=starts.device)
    tile_first = torch.empty(sequences + 1, dtype=torch.int32, device=starts.device)
    start_kernel(
        tile_map_kernel, (max(1, cdiv(count, TILES)),), starts, tile_sequence, tile_first, sequences, count, size, more,
        TILES=TILES, SEQUENCES=SEQUENCES, num_warps=4,
    )  # fmt: skip
    return tile_sequence, tile_first
