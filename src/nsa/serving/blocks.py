"""The memory of one layer as a serving engine gives it: blocks of tokens, which block tables name.

    k, v           rotated keys, and values, of the selection branch      blocks of tokens
    k_cmp, v_cmp   compressed keys (rotated) and values                   in the block of their block's last token
    k_win, v_win   keys (rotated) and values of the window branch         blocks of tokens
    k_raw, v_raw   what compression reads, not rotated                    blocks of tokens

The token at position p of a row lies in block table[row, p // size], place p % size, as in a paged cache
(`nsa.cache_tensors`), and compressed block i in the place of the last of its strides, c = i + l/d - 1, of the same
table. Window and raw tokens are no rings: each lies where a table of its own says, so that rows share those of a common
prefix, and the engine takes a block back when all its tokens are out of reach.

Block 0 is the engine's null block, in the place of what a row does not hold (any more): it is never written, and
nobody sees it.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

NULL_BLOCK = 0


@dataclass(frozen=True)
class LayerBlocks:
    """See the module. `k_win` and `v_win` are None with shared keys and values: the window then reads k and v."""

    k: Float[Tensor, "blocks size g d"]
    v: Float[Tensor, "blocks size g e"]
    k_cmp: Float[Tensor, "blocks strides g d"]
    v_cmp: Float[Tensor, "blocks strides g e"]
    k_win: Float[Tensor, "blocks_win size g d"] | None
    v_win: Float[Tensor, "blocks_win size g e"] | None
    k_raw: Float[Tensor, "blocks_raw size g d"]
    v_raw: Float[Tensor, "blocks_raw size g e"]

    @property
    def size(self) -> int:
        """Tokens in a block."""
        return self.k.shape[1]

    def window(self, table: Tensor, table_win: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and block table of the window."""
        if self.k_win is None or self.v_win is None or table_win is None:
            return self.k, self.v, table
        return self.k_win, self.v_win, table_win


def slots(table: Int[Tensor, "rows n"], row: Tensor, index: Tensor, per_block: int) -> Int[Tensor, "..."]:
    """Flat places of entries `index` of rows `row`, broadcast; -1 where the row does not hold them.

    Entries before the first, past the table and in the null block are not held.
    """
    column = index.div(per_block, rounding_mode="floor")
    block = table[row, column.clamp(0, table.shape[1] - 1)].long()
    held = (index >= 0) & (column < table.shape[1]) & (block > NULL_BLOCK)
    return torch.where(held, block * per_block + index % per_block, -1)


def write(memory: Float[Tensor, "blocks size g d"], slot: Int[Tensor, " n"], x: Float[Tensor, "n g d"]) -> None:
    """x into those of its places that are held."""
    held = slot >= 0
    if not bool(held.all()):
        slot, x = slot[held], x[held]
    memory[slot // memory.shape[1], slot % memory.shape[1]] = x.to(memory.dtype)


def read(memory: Float[Tensor, "blocks size g d"], slot: Tensor) -> Tensor:
    """[*slot, g, d]; anything where a slot is -1."""
    slot = slot.clamp(min=0)
    return memory[slot // memory.shape[1], slot % memory.shape[1]]
