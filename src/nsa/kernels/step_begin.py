"""How a decoding step begins, in one launch: embeddings, and the rotary factors that all layers share.

In PyTorch these are some twenty operations on a few numbers, which wait for each other longer than they take.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nsa.config import NSAConfig
from nsa.kernels import launch
from nsa.kernels.integers import cdiv, next_power_of_2
from nsa.kernels.step import PLAN
from nsa.kernels.tiles import wide


@triton.jit
def _write_factors(cos, sin, row, position, frequencies, scaling, D: tl.constexpr, HALF: tl.constexpr):
    """cos and sin of a position's angles, which both halves of a head have."""
    i = tl.arange(0, HALF)
    inside = i < D // 2
    angle = tl.maximum(position, 0).to(tl.float32) * tl.load(frequencies + i, mask=inside, other=0.0).to(tl.float32)
    c = (tl.cos(angle) * scaling).to(cos.dtype.element_ty)
    s = (tl.sin(angle) * scaling).to(sin.dtype.element_ty)
    at = wide(row) * D + i
    tl.store(cos + at, c, mask=inside)
    tl.store(cos + at + D // 2, c, mask=inside)
    tl.store(sin + at, s, mask=inside)
    tl.store(sin + at + D // 2, s, mask=inside)


@triton.jit
def begin_kernel(
    ids, table, lengths, counts, frequencies, hidden, cos, sin, cos_cmp, sin_cmp, t, num_new, scaling,
    stride_ids, WIDTH: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr, HAS_COUNTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (rows, t + num_new): the columns of a step, then the blocks that may complete."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row, column = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths + row)
    if column < t:
        at = tl.arange(0, PADDED)
        token = tl.load(ids + row * stride_ids + column)
        x = tl.load(table + wide(token) * WIDTH + at, mask=at < WIDTH, other=0.0)
        tl.store(hidden + wide(row * t + column) * WIDTH + at, x, mask=at < WIDTH)
        first = length
        if HAS_COUNTS:
            first += tl.load(counts + row) - t
        _write_factors(cos, sin, row * t + column, first + column, frequencies, scaling, D, HALF)
    else:
        # The block that ends with stride number c begins at (c + 1) d - l; c = length // d is the first to complete.
        number = column - t
        begin = (length // STRIDE + number + 1) * STRIDE - BLOCK
        _write_factors(cos_cmp, sin_cmp, row * num_new + number, begin, frequencies, scaling, D, HALF)


def begin(
    ids: Tensor, table: Tensor, lengths: Tensor, counts: Tensor | None, frequencies: Tensor, scaling: float,
    config: NSAConfig,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Embeddings of a step's tokens, and their rotary factors and those of the blocks that may complete.

    Args:
        ids: [rows, t]. They are trusted.
        table: the embedding [vocabulary, width].
        lengths: tokens of each row before the step, int32.
        counts: how many of the t columns are tokens, the last ones of each row; None where all are.
        frequencies: angles of a step of one position [d / 2]; the angle at position p is p times that, in fp32.
        scaling: of cos and sin.
        config: block sizes.

    Returns:
        [rows, t, width]; then cos, sin [rows, t, d] and cos, sin [rows, new, d] as `DecodeStep` has them, in the
        table's dtype.
    """
    (rows, t), width, d = ids.shape, table.shape[1], 2 * len(frequencies)
    new = cdiv(t, config.compress_stride)
    ids = ids if ids.stride(1) == 1 else ids.contiguous()
    hidden, *factors = (
        torch.empty((rows, columns, size), dtype=table.dtype, device=table.device)
        for columns, size in ((t, width), (t, d), (t, d), (new, d), (new, d))
    )
    pdl = PLAN.pdl and launch.is_hopper(table.device)
    begin_kernel[(rows, t + new)](
        ids, table, lengths, counts, frequencies, hidden, *factors, t, new, float(scaling), ids.stride(0),
        WIDTH=width, PADDED=next_power_of_2(width), D=d, HALF=next_power_of_2(d // 2),
        BLOCK=config.compress_block_size, STRIDE=config.compress_stride, HAS_COUNTS=counts is not None, PDL=pdl,
        num_warps=4, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return hidden, *factors
