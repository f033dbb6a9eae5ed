"""What decoding has to remember of one layer: append new tokens, get back what their queries may read.

    selection    all raw keys and values (rotated)
    window       the last w - 1 before the new tokens
    compression  one key and value a block, and the raw tokens of blocks not yet complete

A dense cache holds s pairs; this one about 1.07 s at 64k, not three times s. One token or four thousand are the same
call, and rows may have different lengths.
"""

from typing import Any

import torch
from torch import Tensor

from nsa.cache.layer import CacheContents, CompressRun, LayerCache
from nsa.config import NSAConfig
from nsa.streams import Branches


class NSACache(LayerCache):
    """The cache of one layer; it grows as tokens come.

    Args:
        config: block sizes and counts of the layer.
        max_crop: how many tokens `crop` can take back (speculative decoding); as many more raw tokens are kept
            for the window and for compression.
    """

    def __init__(self, config: NSAConfig, *, max_crop: int = 64) -> None:
        super().__init__(config, max_crop=max_crop)
        self.clear()

    def clear(self) -> None:
        self.selection, self.compressed = _Rows(), _Rows()
        self.window, self.uncompressed = _Rows(), _Rows()

    @property
    def lengths(self) -> list[int]:
        return list(self.selection.lengths)

    def update(self, new: Branches, compress_run: CompressRun, *, counts: list[int] | None = None) -> Branches:
        (cmp, slc, win), counts = self._as_kept(new, counts, self.selection.data)
        with self.transaction():
            self.selection.append(slc.k, slc.v, counts)
            self.window.append(win.k, win.v, counts)
            self.uncompressed.append(cmp.k, cmp.v, counts)
            self._compress_complete_blocks(compress_run)
            views = self._views(full=min(counts) == slc.k.shape[1])
            # What later queries cannot see goes; the views live until this step's attention is done.
            self.window.keep_last(self.config.window_size - 1 + self.max_crop)
            self.uncompressed.keep_last(self.config.compress_block_size - 1 + self.max_crop)
            return views

    def _views(self, full: bool) -> Branches:
        """`full`: no row's tokens have padding queries before them."""
        tensors = (*self.compressed.view(), *self.selection.view(), *self.window.view())
        # Rows of one length may keep different parts of it: one history, not one length, makes rows uniform.
        is_uniform = full and len(set(zip(self.selection.lengths, self.window.lengths, strict=True))) == 1
        seqlens = [
            None if is_uniform else torch.tensor(part.lengths, device=tensors[0].device)
            for part in (self.selection, self.window)
        ]
        return Branches.of(self.config, tensors, (None, None, *seqlens))

    def _compress_complete_blocks(self, compress_run: CompressRun) -> None:
        k_raw, v_raw = self.uncompressed.view()
        if not self.compressed.lengths:
            self.compressed.append(k_raw[:, :0], v_raw[:, :0], [0] * len(self.lengths))
        histories = list(zip(self.lengths, self.uncompressed.lengths, self.compressed.lengths, strict=True))
        is_uniform = len(set(histories)) == 1
        new: list[tuple[Tensor, Tensor]] = []
        for row, (length, stored, have) in enumerate(histories[:1] if is_uniform else histories):
            rows = slice(None) if is_uniform else slice(row, row + 1)
            want = self.config.num_compressed_blocks(length)
            start = have * self.config.compress_stride - (length - stored)
            stop = start + (want - have - 1) * self.config.compress_stride + self.config.compress_block_size
            k, v = k_raw[rows, :0], v_raw[rows, :0]
            if want > have:
                k, v = compress_run(k_raw[rows, start:stop], v_raw[rows, start:stop], have)
            new.append((k.to(k_raw.dtype), v.to(v_raw.dtype)))
        if is_uniform:
            k, v = new[0]
            self.compressed.append(k, v, [k.shape[1]] * len(self.lengths))
        else:
            k, v = (_right_aligned([pair[i][0] for pair in new]) for i in (0, 1))
            self.compressed.append(k, v, [k.shape[1] for k, _ in new])

    def _before(self) -> Any:
        # Tokens come behind those that are there, also where the memory is exchanged for more of it: to hold on to the
        # old one would take as much again. A graph may hold it anyway, and must not be found in the new one.
        old = [(self.selection, torch.is_grad_enabled()), (self.compressed, torch.is_grad_enabled())]
        old += [(self.window, True), (self.uncompressed, True)]
        return [(part, part.data if whole or not part.data else None, part.lengths) for part, whole in old]

    def _go_back(self, before: Any) -> None:
        for part, data, lengths in before:
            part.data, part.lengths = part.data if data is None else data, lengths
            part.may_be_in_a_graph = True

    def crop(self, num_tokens: int) -> None:
        seen = self.selection.lengths
        first_window, first_raw = (
            [length - kept for length, kept in zip(seen, part.lengths, strict=True)]
            for part in (self.window, self.uncompressed)
        )
        self._check_crop(num_tokens, first_window, first_raw)
        for rows in (self.selection, self.window, self.uncompressed):
            rows.lengths = [length - num_tokens for length in rows.lengths]
        self.compressed.lengths = [self.config.num_compressed_blocks(length) for length in self.lengths]

    def reorder(self, rows: Tensor) -> None:
        if not self.lengths:
            return
        index, chosen = self._rows_from(rows, self.selection.data[0].device)
        parts = (self.selection, self.window, self.uncompressed, self.compressed)
        data = [tuple(x.index_select(0, index) for x in part.data) for part in parts]
        for part, tensors in zip(parts, data, strict=True):
            part.data, part.lengths = tensors, [part.lengths[row] if row >= 0 else 0 for row in chosen]

    def num_bytes(self) -> int:
        """Room for growth is not counted."""
        return sum(part.num_bytes() for part in (self.selection, self.window, self.uncompressed, self.compressed))

    def contents(self) -> CacheContents | None:
        if not self.lengths:
            return None
        near, raw = self.window, self.uncompressed
        k_raw, v_raw = raw.view()
        return CacheContents(
            self.lengths, *self.selection.view(), *self.compressed.view(),
            list(near.lengths), *near.view(), list(raw.lengths), k_raw, v_raw,
        )  # fmt: skip

    def fill(self, contents: CacheContents) -> None:
        c = contents
        blocks = [self.config.num_compressed_blocks(length) for length in c.lengths]
        parts = [
            _Rows.of(c.k, c.v, c.lengths), _Rows.of(c.k_cmp, c.v_cmp, blocks),
            _Rows.of(c.k_win, c.v_win, c.window_lengths), _Rows.of(c.k_raw, c.v_raw, c.raw_lengths),
        ]  # fmt: skip
        self.selection, self.compressed, self.window, self.uncompressed = parts


class _Rows:
    """Key and value rows of different lengths, left-aligned, with room to grow."""

    __slots__ = ("data", "lengths", "may_be_in_a_graph")

    def __init__(self) -> None:
        self.data: tuple[Tensor, ...] = ()  # k, v: [b, capacity, g, d]
        self.lengths: list[int] = []
        # Whether a graph may hold the memory, which must then not be written any more: keys that need no gradient are
        # held for those of the queries.
        self.may_be_in_a_graph = False

    @classmethod
    def of(cls, k: Tensor, v: Tensor, lengths: list[int]) -> "_Rows":
        """A copy of the first lengths[r] columns of each row."""
        rows = cls()
        rows.data, rows.lengths = tuple(x[:, : max(lengths)].clone() for x in (k, v)), list(lengths)
        return rows

    def append(self, k: Tensor, v: Tensor, counts: list[int]) -> None:
        """Put the last counts[r] columns of k and v behind row r."""
        b, t = k.shape[:2]
        new = (k, v)
        if not self.data:
            self.data, self.lengths = tuple(x.new_zeros(b, 0, *x.shape[2:]) for x in new), [0] * b
        ends = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        longest, needed = max(self.lengths), max(ends)
        has_graph = self.may_be_in_a_graph or any(x.requires_grad for x in self.data)
        has_graph = has_graph or (torch.is_grad_enabled() and any(x.requires_grad for x in new))
        is_read_only = self.data[0].is_inference() and not torch.is_inference_mode_enabled()
        if needed > self.data[0].shape[1] or has_graph or is_read_only:
            # Into new memory: half as much again, so that a token at a time copies little; exact for a graph.
            room = needed if has_graph or longest == 0 else needed * 3 // 2
            self.data = tuple(
                torch.cat([old[:, :longest], old.new_zeros(b, room - longest, *old.shape[2:])], dim=1)
                for old in self.data
            )
            self.may_be_in_a_graph = False
        for old, x in zip(self.data, new, strict=True):
            if len(set(self.lengths)) == 1 and min(counts) == t:
                old[:, longest : longest + t] = x
            else:
                for row, (end, count) in enumerate(zip(ends, counts, strict=True)):
                    old[row, end - count : end] = x[row, t - count :]
        self.lengths = ends

    def keep_last(self, number: int) -> None:
        """Forget all but the last `number` columns of each row, once enough has gathered to be worth a copy."""
        if not self.lengths or max(self.lengths) < 2 * number:
            return
        firsts = [max(0, length - number) for length in self.lengths]
        self.lengths = [length - first for length, first in zip(self.lengths, firsts, strict=True)]
        if len(set(firsts)) == 1:
            self.data = tuple(x[:, firsts[0] :].clone() for x in self.data)
        else:
            self.data = tuple(
                torch.stack([x[row].roll(-first, 0) for row, first in enumerate(firsts)])[:, : max(self.lengths)]
                for x in self.data
            )

    def view(self) -> tuple[Tensor, Tensor]:
        k, v = self.data
        self.may_be_in_a_graph = self.may_be_in_a_graph or torch.is_grad_enabled()
        longest = max(self.lengths, default=0)
        return k[:, :longest], v[:, :longest]

    def num_bytes(self) -> int:
        return sum(
            length * x[0, 0].numel() * x.element_size() for x in self.data if x.numel() for length in self.lengths
        )


def _right_aligned(rows: list[Tensor]) -> Tensor:
    """Rows [m_r, g, d] of different lengths as one tensor [b, max m, g, d], zeros in front."""
    longest = max(row.shape[0] for row in rows)
    return torch.stack([torch.cat([row.new_zeros(longest - len(row), *row.shape[1:]), row]) for row in rows])
