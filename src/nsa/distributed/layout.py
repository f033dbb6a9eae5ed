"""Where this rank's tokens lie in sequences that several ranks hold: made once, shared by all layers.

Everything that depends on where packed sequences begin stays on the device, in shapes that follow from shapes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from nsa.config import NSAConfig
from nsa.decode_step import Rotary
from nsa.distributed.context import ContextParallel, Order, Window
from nsa.ops.compress import blocks_of
from nsa.ops.packed_blocks import PackedBlocks
from nsa.shapes import check_lengths, packed_positions


@dataclass(frozen=True)
class Chunk:
    """One of a rank's two runs of tokens.

    keys: the tokens that its queries can see, from the first of all to its own last one.
    halo: its own tokens, and before them those that its compression blocks may begin with.
    blocks: which tokens of the halo each block takes; without packed sequences they begin at token `first` of it.
    cos, sin: rotary factors of its compressed keys.
    cu_seqlens_q, cu_seqlens_k: of packed sequences: its queries, and its keys.
    """

    keys: Window
    halo: Window
    first: int
    blocks: PackedBlocks | None
    cos: Float[Tensor, "_ m d"]
    sin: Float[Tensor, "_ m d"]
    cu_seqlens_q: Int[Tensor, " sequences_plus_1"] | None = None
    cu_seqlens_k: Int[Tensor, " sequences_plus_1"] | None = None

    def gather(self, x: Tensor, count: int, config: NSAConfig) -> Tensor:
        """The blocks [b, count, g, l, d] of what lies in the halo; those that do not exist hold zeros.

        Whatever there is, the result depends on x: all ranks take the same steps in backward.
        """
        found = blocks_of(x[:, self.first :], config) if self.blocks is None else self.blocks.gather(x)
        if found.shape[1] == 0:
            found = x[:, :0, :, None].expand(-1, -1, -1, config.compress_block_size, -1)
        return F.pad(found, [0] * 7 + [count - found.shape[1]])


@dataclass(frozen=True)
class ContextLayout:
    """Of b rows and t = 2 n columns, this rank's two chunks of rows of T = t P tokens.

    cos, sin: rotary factors of the tokens, [b or 1, t, d].
    order: of compressed blocks that were gathered from all chunks, `num_blocks` from each.
    """

    context: ContextParallel
    config: NSAConfig
    cos: Float[Tensor, "_ t d"]
    sin: Float[Tensor, "_ t d"]
    chunks: tuple[Chunk, Chunk]
    order: Order
    num_blocks: int
    is_packed: bool
    max_seqlen: int | None

    @classmethod
    def of(
        cls,
        x: Float[Tensor, "b t hidden"],
        rotary: Rotary,
        config: NSAConfig,
        context: ContextParallel,
        *,
        cu_seqlens: Int[Tensor, " sequences_plus_1"] | None = None,
        max_seqlen: int | None = None,
        position_ids: Int[Tensor, "_ t"] | None = None,
    ) -> "ContextLayout":
        """Of this rank's hidden states; lengths are those of all tokens, positions those of this rank's.

        Raises:
            ValueError: chunks of unequal length; packed sequences in several rows; positions of another shape.
        """
        t = x.shape[1]
        total = check_shard(x, context, cu_seqlens, position_ids)
        if cu_seqlens is not None:
            check_lengths("cu_seqlens", cu_seqlens)
        bounds = (torch.tensor([0, total]) if cu_seqlens is None else cu_seqlens).to(x.device, torch.int64)
        count = (t // 2 + config.compress_block_size - 1) // config.compress_stride
        if position_ids is None:
            everywhere = packed_positions(bounds, torch.arange(total, device=x.device))[None]
            positions = context.zigzag.shard(everywhere)
        else:
            positions = position_ids.to(x.device)
            everywhere = context.gather(positions)
        cos, sin = rotary(x, positions)

        chunks = []
        for start, stop in context.zigzag.spans(total):
            halo = max(0, start - config.compress_block_size + 1), stop
            first = _aligned(max(0, start - config.compress_block_size + 1), config) - halo[0]
            blocks = cu_q = cu_k = None
            if cu_seqlens is None:
                at = first + config.compress_stride * torch.arange(count, device=x.device)
            else:
                blocks = PackedBlocks.of(_own_sequences(bounds, start, halo, config), stop - halo[0], config)
                at = F.pad(blocks.tokens[:, 0], (0, count - len(blocks.tokens)))
                cu_q, cu_k = boundaries(bounds, (start, stop))
            cos_cmp, sin_cmp = rotary(x, everywhere[:, (halo[0] + at).clamp(max=total - 1)])
            chunks.append(Chunk((0, stop), halo, first, blocks, cos_cmp, sin_cmp, cu_q, cu_k))
        order = _order(bounds, total, count, 2 * context.size, config, is_packed=cu_seqlens is not None)
        is_packed = cu_seqlens is not None
        return cls(context, config, cos, sin, (chunks[0], chunks[1]), order, count, is_packed, max_seqlen)


def check_shard(x: Tensor, context: ContextParallel, cu_seqlens: Tensor | None, position_ids: Tensor | None) -> int:
    """The number T of all tokens of a row; ValueError where x is no rank's part of it."""
    b, t = x.shape[:2]
    if t < 2 or t % 2:
        raise ValueError(f"context parallelism: a rank holds two chunks of equal length, got {t} tokens")
    if cu_seqlens is not None and b != 1:
        raise ValueError(f"context parallelism: packed sequences should come as one row, got {b} rows")
    if position_ids is not None and tuple(position_ids.shape) not in ((b, t), (1, t)):
        raise ValueError(f"position_ids should have shape [b={b} or 1, t={t}], got {list(position_ids.shape)}")
    return t * context.size


def boundaries(cu_seqlens: Tensor, chunk: Window) -> tuple[Tensor, Tensor]:
    """Packed sequences as a chunk sees them, int32: its queries, and the keys up to its end."""
    start, stop = chunk
    return (cu_seqlens.clamp(start, stop) - start).to(torch.int32), cu_seqlens.clamp(max=stop).to(torch.int32)


def _aligned(token: int, config: NSAConfig) -> int:
    """The first multiple of the stride that is not before `token`."""
    return -(-token // config.compress_stride) * config.compress_stride


def _own_sequences(bounds: Tensor, start: int, halo: Window, config: NSAConfig) -> Int[Tensor, " sequences_plus_2"]:
    """Boundaries, within the halo, of sequences whose blocks are those that end in the chunk.

    The first of them, shorter than a block, is what no such block takes.
    """
    size, stride = config.compress_block_size, config.compress_stride
    own = (torch.searchsorted(bounds, start, right=True) - 1).clamp(0, len(bounds) - 2)  # it goes through `start`
    skipped = (start - size + 1 - bounds[own]).clamp(min=0)
    begin = bounds[own] + -(-skipped // stride) * stride
    inner = torch.where(torch.arange(len(bounds), device=bounds.device) <= own, begin, bounds)
    return F.pad((inner - halo[0]).clamp(0, halo[1] - halo[0]), (1, 0))


def _order(bounds: Tensor, total: int, count: int, chunks: int, config: NSAConfig, *, is_packed: bool) -> Order:
    """Blocks follow each other as their last tokens do, and lie in the chunk of their last token."""
    size, stride, device = config.compress_block_size, config.compress_stride, bounds.device
    ends = torch.arange(chunks + 1, device=device)[:, None] * (total // chunks)
    lengths = torch.minimum(bounds[1:], ends) - bounds[:-1]
    before = ((lengths - size).div(stride, rounding_mode="floor") + 1).clamp(min=0).sum(1)  # blocks before each chunk

    number = total // stride if is_packed else config.num_compressed_blocks(total)
    block = torch.arange(number, device=device)
    chunk = torch.searchsorted(before[1:].contiguous(), block, right=True).clamp(max=chunks - 1)
    of = chunk * count + (block - before[chunk]).clamp(0, count - 1)
    at = before[:-1, None] + torch.arange(count, device=device)
    exists = at < before[1:, None]
    return Order(of, at.where(exists, 0).flatten(), exists.flatten())
