"""One step of a serving engine: which rows get which tokens, and what follows from it for every layer alike."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from jaxtyping import Int
from torch import Tensor

from nsa.config import NSAConfig
from nsa.serving.blocks import NULL_BLOCK, slots


@dataclass(frozen=True)
class Step:
    """New tokens of some rows, packed one row after another.

    Args:
        config: block sizes of the model.
        size: tokens in a block of the engine; l' divides it.
        starts: where each row's new tokens begin among the packed ones, and where the last ones end; from 0, never
            falling. A row may have none.
        lengths: tokens of each row, the new ones included; 0 is legal.
        table: block tables of the selection branch, and of compressed keys.
        table_win, table_raw: those of the window and of raw tokens; the window's is None with shared keys and values.

    Raises:
        ValueError: sizes that do not fit each other, or more new tokens than a row has.
    """

    config: NSAConfig
    size: int
    starts: Sequence[int]
    lengths: Sequence[int]
    table: Int[Tensor, "rows n"]
    table_win: Int[Tensor, "rows n_win"] | None
    table_raw: Int[Tensor, "rows n_raw"]

    def __post_init__(self) -> None:
        rows, starts = len(self.lengths), list(self.starts)
        check_block_size(self.size, self.config)
        if len(starts) != rows + 1 or starts[0] != 0 or any(low > high for low, high in pairwise(starts)):
            raise ValueError(f"Step: starts should rise from 0, one for each of {rows} rows and the end, got {starts}")
        for name in ("table", "table_win", "table_raw"):
            table = getattr(self, name)
            if table is not None and (table.dim() != 2 or table.shape[0] != rows):
                raise ValueError(f"Step: {name} should have shape [rows={rows}, blocks], got {list(table.shape)}")
        if (self.table_win is None) != self.config.shared_kv:
            raise ValueError("Step: expected table_win exactly where the window has its own keys and values")
        if any(new > length for new, length in zip(self.counts, self.lengths, strict=True)):
            raise ValueError(f"Step: rows of {list(self.lengths)} tokens cannot have {self.counts} new ones")

    @property
    def device(self) -> torch.device:
        return self.table.device

    @cached_property
    def counts(self) -> list[int]:
        """New tokens of each row."""
        return [stop - start for start, stop in pairwise(self.starts)]

    @property
    def num_tokens(self) -> int:
        return self.starts[-1]

    @cached_property
    def tables_without_null(self) -> tuple[Int[Tensor, "rows n"], Int[Tensor, "rows n_win"] | None]:
        """table and table_win as the kernels have them: -1 where there is no block."""
        table, win = self.table, self.table_win
        return _without_null(table), None if win is None else _without_null(win)

    # ---- where the new tokens go ------------------------------------------------------------------------------

    @cached_property
    def _tokens(self) -> tuple[Tensor, Tensor]:
        """Row and position of each new token."""
        before = [length - new for length, new in zip(self.lengths, self.counts, strict=True)]
        return self._runs(before, list(self.lengths))

    @property
    def rows(self) -> Int[Tensor, " tokens"]:
        """Row of each new token."""
        return self._tokens[0]

    @property
    def positions(self) -> Int[Tensor, " tokens"]:
        """Position of each new token in its row."""
        return self._tokens[1]

    @cached_property
    def token_slots(self) -> Int[Tensor, " tokens"]:
        return slots(self.table, *self._tokens, self.size)

    @cached_property
    def window_slots(self) -> Int[Tensor, " tokens"]:
        assert self.table_win is not None
        return slots(self.table_win, *self._tokens, self.size)

    @cached_property
    def raw_slots(self) -> Int[Tensor, " tokens"]:
        return slots(self.table_raw, *self._tokens, self.size)

    # ---- blocks that the new tokens complete: those that end with a stride c, (c + 1) d <= length ---------------

    @cached_property
    def _strides(self) -> tuple[Tensor, Tensor]:
        """Row of each block that is completed, and the last of its strides."""
        stride, first = self.config.compress_stride, self.config.compress_block_size // self.config.compress_stride - 1
        pairs = zip(self.lengths, self.counts, strict=True)
        return self._runs(
            [max(first, (length - new) // stride) for length, new in pairs],
            [length // stride for length in self.lengths],
        )

    @cached_property
    def empty_slots(self) -> Int[Tensor, " empty"]:
        """The places of the strides before those with which rows' first blocks end: they hold nothing."""
        stride, first = self.config.compress_stride, self.config.compress_block_size // self.config.compress_stride - 1
        before = [length - new for length, new in zip(self.lengths, self.counts, strict=True)]
        run = self._runs(
            [length // stride for length in before], [min(first, length // stride) for length in self.lengths]
        )
        return slots(self.table, *run, self.size // stride)

    @property
    def block_positions(self) -> Int[Tensor, " completed"]:
        """Position of the first token of each block that is completed."""
        stride = self.config.compress_stride
        return (self._strides[1] + 1) * stride - self.config.compress_block_size

    @cached_property
    def compressed_slots(self) -> Int[Tensor, " completed"]:
        return slots(self.table, *self._strides, self.size // self.config.compress_stride)

    @cached_property
    def block_slots(self) -> Int[Tensor, "completed l"]:
        """Where the raw tokens of each block that is completed lie."""
        within = torch.arange(self.config.compress_block_size, device=self.device)
        row = self._strides[0][:, None]
        return slots(self.table_raw, row, self.block_positions[:, None] + within, self.size)

    def _runs(self, firsts: list[int], ends: list[int]) -> tuple[Tensor, Tensor]:
        """(row, i) for first <= i < end of every row, one after another."""
        counts = [max(0, end - first) for first, end in zip(firsts, ends, strict=True)]
        count, first = torch.tensor([counts, firsts]).reshape(2, -1)
        row = torch.repeat_interleave(torch.arange(len(counts)), count)
        begins = first - (count.cumsum(0) - count)
        index = torch.arange(len(row)) + begins[row]
        return row.to(self.device), index.to(self.device)


def _without_null(table: Int[Tensor, "rows n"]) -> Int[Tensor, "rows n"]:
    return table.where(table > NULL_BLOCK, -1).int().contiguous()


def check_block_size(size: int, config: NSAConfig) -> None:
    """ValueError where l' does not divide the engine's blocks of `size` tokens."""
    if size < 1 or size % config.select_block_size:
        raise ValueError(
            f"block size: expected a multiple of select_block_size={config.select_block_size} (l'), got {size}"
        )
