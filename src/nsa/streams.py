"""The keys and values of a branch as one object, and which of its entries a query sees: all that tells branches apart.

Whoever moves keys and values about (a cache, a layer, a group of GPUs) moves streams, and whoever attends takes
`(q, stream, reach)`. They are tuples: they cost nothing, and torch.compile and torch.export look into them.
"""

from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from nsa.config import NSAConfig
from nsa.shapes import UNIFORM, Sequences


class Stream(NamedTuple):
    """Keys and values; entry i of a sequence stands for its tokens i * stride .. i * stride + block - 1.

    k, v: one entry a token with the defaults; the keys carry their rotary position.
    where: where the sequences lie among queries and tokens; entries follow one another in the same order.
    num_tokens: s, the tokens behind pooled entries, where `where` has no lengths.
    """

    k: Float[Tensor, "b c g d"]
    v: Float[Tensor, "b c g e"]
    block: int = 1
    stride: int = 1
    where: Sequences = UNIFORM
    num_tokens: int | None = None

    @property
    def is_pooled(self) -> bool:
        return self.block > 1 or self.stride > 1

    def num_entries(self, length: int) -> int:
        """Entries that lie wholly inside the first `length` tokens: entry i needs i * stride + block <= length."""
        return max(0, (length - self.block) // self.stride + 1)


class Causal(NamedTuple):
    """Every entry that ends at or before the query."""


class Window(NamedTuple):
    """The last `size` tokens, the query's own included; of raw streams."""

    size: int


class Blocks(NamedTuple):
    """The tokens up to the query's own of the blocks of `size` tokens that it lists; of raw streams.

    indices: per query and KV head, int32 or int64, no repeats, -1 for an empty slot, in any order; counted from the
        start of the query's own sequence.
    num_local: so many blocks that end with the query's own are in most lists. It orders the work and means nothing.
    """

    indices: Int[Tensor, "b t g n"]
    size: int
    num_local: int = 1


Reach = Causal | Window | Blocks


class Branches(NamedTuple):
    """What the three branches of NSA attend to."""

    cmp: Stream  # compressed keys and values
    slc: Stream
    win: Stream

    @classmethod
    def of(cls, config: NSAConfig, tensors: Sequence[Tensor], lengths: Sequence[Tensor | None]) -> "Branches":
        """Of k and v of cmp, slc, win; and cu_seqlens_q, cu_seqlens_k, seqlens_k, seqlens_win (None: as seqlens_k)."""
        k_cmp, v_cmp, k, v, k_win, v_win = tensors
        *rows, rows_win = lengths
        where = Sequences(*rows)
        near = where if rows_win is None or rows_win is where.seqlens_k else Sequences(seqlens_k=rows_win)
        cmp = Stream(k_cmp, v_cmp, config.compress_block_size, config.compress_stride, where, k.shape[1])
        return cls(cmp, Stream(k, v, where=where), Stream(k_win, v_win, where=near))

    @classmethod
    def of_tokens(cls, *tensors: Tensor) -> "Branches":
        """Of keys and values of new tokens, none of them pooled yet: `tensors` of what this returns."""
        k_raw, v_raw, k, v, k_win, v_win = tensors
        where = Sequences()  # not the default's object, which torch.compile of PyTorch 2.11 cannot look into
        return cls(Stream(k_raw, v_raw, where=where), Stream(k, v, where=where), Stream(k_win, v_win, where=where))

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """k and v of cmp, slc, win."""
        cmp, slc, win = self
        return cmp.k, cmp.v, slc.k, slc.v, win.k, win.v

    @property
    def lengths(self) -> list[Tensor | None]:
        """cu_seqlens_q, cu_seqlens_k, seqlens_k, seqlens_win."""
        where, near = self.slc.where, self.win.where
        return [where.cu_seqlens_q, where.cu_seqlens_k, where.seqlens_k, near.seqlens_k]
