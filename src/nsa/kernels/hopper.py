"""When the kernels for Hopper serve, their tiles, and how they are launched.

They take what is most often asked for: 16-bit inputs, heads of 64 or 128 dims for keys and values alike or the paper's
192 and 128, dense rows.
Everything else on Hopper, and every other GPU, has the kernels in plain Triton, which compute the same.
"""

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from nsa.kernels import launch
from nsa.kernels.launch import Heads, TileSize
from nsa.kernels.layout import Layout, TileMap
from nsa.kernels.start import start_kernel
from nsa.kernels.tiles import LOG2E

if TYPE_CHECKING:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Gluon is experimental in Triton: only the versions that it was tried with.
_HAS_GLUON = triton.__version__.startswith(("3.6.", "3.7."))

WIDTHS = ((64, 64), (128, 128), (192, 128))
# Rows (queries x heads; queries in scoring), keys, warps, stages: two programs are to fit on a multiprocessor.
ATTENTION: launch.Candidate = (64, 64, 4, 3)
SCORING: launch.Candidate = (64, 128, 4, 3)
STAGES_OF_SPLIT = 2  # where keys have more than 128 dims


def serves_selected(q: Tensor, k: Tensor, v: Tensor, heads: Heads, select: int) -> bool:
    # Fewer heads to a group would mean more queries in a tile, whose blocks differ more.
    return serves_compressed(q, k, v, heads) and select in (32, 64) and heads.padded_group in (8, 16, 32)


def serves_compressed(q: Tensor, k: Tensor, v: Tensor, heads: Heads) -> bool:
    return _serves(heads, q, k, v) and (heads.d, heads.e) in WIDTHS


def serves_scoring(q: Tensor, k_cmp: Tensor, heads: Heads, per_block: int) -> bool:
    return _serves(heads, k_cmp, q) and per_block in (1, 2, 4, 8, 16, 32)


def _serves(heads: Heads, *tensors: Tensor) -> bool:
    """The first tensor is read by rows, the others by descriptor."""
    x, *copied = tensors
    return (
        _HAS_GLUON
        and x.dtype in (torch.bfloat16, torch.float16)
        and heads.d in (64, 128, 192)
        and all(y.is_contiguous() and y.numel() > 0 and y.data_ptr() % 16 == 0 for y in copied)
        and launch.is_hopper(x.device)
    )


def tile_of(candidate: launch.Candidate, heads: Heads, group: int) -> TileSize:
    rows, block_n, warps, stages = candidate
    return TileSize(rows // group, block_n, warps, min(stages, STAGES_OF_SPLIT) if heads.split_d[1] else stages, "tf32")


def selected_forward(
    q: Tensor, k: Tensor, v: Tensor, items: Tensor, counts: Tensor, out: Tensor, lse: Tensor,
    layout: Layout, tiles: TileMap, heads: Heads, select: int, n: int, scale: float,
) -> None:  # fmt: skip
    from nsa.kernels.hopper_attention import selected_forward_hopper_kernel

    tile = tile_of(ATTENTION, heads, heads.padded_group)
    start_kernel(
        selected_forward_hopper_kernel, (tiles.count, heads.g, layout.b),
        q, k, v, *_descriptors(k, select, heads), _descriptor(v, select, heads.e), items, counts, out, lse,
        *layout.arguments, tiles.sequence, tiles.first, layout.t, layout.s, scale * LOG2E.value,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        G=heads.per_group, GP=heads.padded_group, DP=heads.split_d[0], DR=heads.split_d[1], E=heads.e,
        SELECT=select, N=n, LAYOUT=layout.kind,
        BLOCK_Q=tile.block_q, STAGES=tile.stages, num_warps=tile.warps,
    )  # fmt: skip


def compressed_forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: Layout, heads: Heads, scale: float
) -> None:
    from nsa.kernels.hopper_attention import compressed_forward_hopper_kernel

    tile = tile_of(ATTENTION, heads, heads.padded_group)
    tiles = layout.query_tiles(tile.block_q)
    start_kernel(
        compressed_forward_hopper_kernel, (tiles.count, heads.g, layout.b),
        q, k, v, *_descriptors(k, tile.block_n, heads), _descriptor(v, tile.block_n, heads.e), out, lse,
        *layout.arguments, tiles.sequence, tiles.first, layout.t, layout.s, k.shape[1], scale * LOG2E.value,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        G=heads.per_group, GP=heads.padded_group, DP=heads.split_d[0], DR=heads.split_d[1], E=heads.e,
        BLOCK=layout.block, STRIDE=layout.stride,
        LAYOUT=layout.kind, BLOCK_Q=tile.block_q, BLOCK_N=tile.block_n, STAGES=tile.stages, num_warps=tile.warps,
    )  # fmt: skip


def scoring(
    q: Tensor, k_cmp: Tensor, lse: Tensor, own: Tensor, spill: Tensor, layout: Layout, tiles: TileMap,
    offset: int, count: int, key_tiles: int, num_blocks: int, heads: Heads, per_block: int, scale: float,
) -> None:  # fmt: skip
    from nsa.kernels.hopper_scoring import scoring_hopper_kernel

    tile = tile_of(SCORING, heads, 1)
    start_kernel(
        scoring_hopper_kernel, (count, key_tiles, layout.b * heads.g),
        *_descriptors(q, tile.block_q, heads), k_cmp, lse, own, spill, *layout.arguments, tiles.sequence, tiles.first,
        layout.t, layout.s, offset, num_blocks, heads.g, scale * LOG2E.value, *k_cmp.stride()[:3],
        G=heads.per_group, DP=heads.split_d[0], DR=heads.split_d[1], BLOCK=layout.block,
        STRIDE=layout.stride, PER_BLOCK=per_block, LAYOUT=layout.kind, BLOCK_Q=tile.block_q, BLOCK_N=tile.block_n,
        STAGES=tile.stages, num_warps=tile.warps,
    )  # fmt: skip


def _descriptors(x: Tensor, rows: int, heads: Heads) -> "tuple[TensorDescriptor, TensorDescriptor | None]":
    """For the two parts of queries' or keys' columns (`tiles.columns`)."""
    main, rest = heads.split_d
    return _descriptor(x, rows, main), _descriptor(x, rows, rest) if rest else None


def _descriptor(x: Tensor, rows: int, width: int) -> "TensorDescriptor":
    """x [b, s, heads, d] as a matrix, of which `rows` rows of `width` columns are copied at a time."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    b, s, heads, d = x.shape
    layout = _shared_layout(rows, width, x.dtype)
    return TensorDescriptor(x, [b * s, heads * d], [heads * d, 1], [rows, width], layout)


@lru_cache
def _shared_layout(rows: int, d: int, dtype: torch.dtype) -> Any:
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout.get_default_for([rows, d], gl.bfloat16 if dtype == torch.bfloat16 else gl.float16)
