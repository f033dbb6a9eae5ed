"""What decoding has to remember of one layer: append new tokens, get back what their queries may read.

    selection    all raw keys and values (rotated)
    window       the last w - 1 before the new tokens
    compression  one key and value a block, and the raw tokens of blocks not yet complete

A dense cache holds s pairs; this one about 1.07 s at 64k, not three times s. One token or four thousand are the same
call, and rows may have different lengths.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from nsa.cache.layer import CacheContents, CacheViews, CompressRun, LayerCache, row_indices
from nsa.config import NSAConfig


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

    def append(
        self,
        k: Float[Tensor, "b t g d"],
        v: Float[Tensor, "b t g e"],
        k_win: Float[Tensor, "b t g d"],
        v_win: Float[Tensor, "b t g e"],
        k_raw: Float[Tensor, "b t g d"],
        v_raw: Float[Tensor, "b t g e"],
        compress_run: CompressRun,
        *,
        counts: list[int] | None = None,
    ) -> CacheViews:
        b, t = k.shape[:2]
        self.check_rows(b)
        counts = [t] * b if counts is None else counts
        self.window.append(k_win, v_win, counts)
        self.uncompressed.append(k_raw, v_raw, counts)
        self.selection.append(k, v, counts)
        self._compress_complete_blocks(compress_run)

        k_slc, v_slc = self.selection.view()
        k_cmp, v_cmp = self.compressed.view()
        k_near, v_near = self.window.view()
        # Uniform rows need no lengths, unless padding queries stand before their tokens.
        uniform = len(set(self.lengths)) <= 1 and min(counts, default=t) == t
        seqlens = [None if uniform else torch.tensor(x.lengths, device=k.device) for x in (self.selection, self.window)]
        views = CacheViews(k_slc, v_slc, k_cmp, v_cmp, k_near, v_near, *seqlens)
        # What later queries cannot see goes; the views live until this step's attention is done.
        self.window.keep_last(self.config.window_size - 1 + self.max_crop)
        self.uncompressed.keep_last(self.config.compress_block_size - 1 + self.max_crop)
        return views

    def _compress_complete_blocks(self, compress_run: CompressRun) -> None:
        lengths, stored = self.selection.lengths, self.uncompressed.lengths
        if not self.compressed.lengths:
            k, v = self.uncompressed.view()
            self.compressed.append(k[:, :0], v[:, :0], [0] * len(lengths))
        rows = [slice(0, len(lengths))] if len(set(lengths)) == 1 else [slice(r, r + 1) for r in range(len(lengths))]
        new: list[tuple[Tensor, Tensor]] = []
        for row in rows:
            length, have = lengths[row.start], self.compressed.lengths[row.start]
            want = self.config.num_compressed_blocks(length)
            start = have * self.config.compress_stride - (length - stored[row.start])
            stop = start + (want - have - 1) * self.config.compress_stride + self.config.compress_block_size
            k, v = (x[row, start:stop] if want > have else x[row, :0] for x in self.uncompressed.data)
            new.append(compress_run(k, v, have) if want > have else (k, v))
        if len(new) == 1:
            k, v = new[0]
            self.compressed.append(k, v, [k.shape[1]] * len(lengths))
        elif new:
            counts = [k.shape[1] for k, _ in new]
            k, v = (_right_aligned([pair[i][0] for pair in new]) for i in (0, 1))
            self.compressed.append(k, v, counts)

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
        for part in (self.selection, self.window, self.uncompressed, self.compressed):
            part.reorder(rows)

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
        self.selection.fill(c.k, c.v, c.lengths)
        self.compressed.fill(c.k_cmp, c.v_cmp, blocks)
        self.window.fill(c.k_win, c.v_win, c.window_lengths)
        self.uncompressed.fill(c.k_raw, c.v_raw, c.raw_lengths)


class _Rows:
    """Key and value rows of different lengths, left-aligned, with room to grow."""

    def __init__(self) -> None:
        self.data: tuple[Tensor, ...] = ()  # k, v: [b, capacity, g, d]
        self.lengths: list[int] = []

    def append(self, k: Tensor, v: Tensor, counts: list[int]) -> None:
        """Put the last counts[r] columns of k and v behind row r."""
        b, t = k.shape[:2]
        new = (k, v)
        if not self.data:
            self.data, self.lengths = tuple(x[:, :0] for x in new), [0] * b
        ends = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        graph = torch.is_grad_enabled() and any(x.requires_grad for x in (*new, *self.data))
        if max(ends, default=0) > self.data[0].shape[1] or graph:
            # Into new memory: half as much again, so that a token at a time copies little; exact for a graph.
            room = max(ends) if graph or max(self.lengths) == 0 else max(ends) * 3 // 2
            self.data = tuple(
                torch.cat(
                    [old[:, : max(self.lengths)], old.new_zeros(b, room - max(self.lengths), *old.shape[2:])],
                    dim=1,
                )
                for old in self.data
            )
        for old, x in zip(self.data, new, strict=True):
            if len(set(self.lengths)) <= 1 and min(counts, default=t) == t:
                old[:, ends[0] - t : ends[0]] = x
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
        longest = max(self.lengths, default=0)
        return k[:, :longest], v[:, :longest]

    def fill(self, k: Tensor, v: Tensor, lengths: list[int]) -> None:
        longest = max(lengths, default=0)
        self.data, self.lengths = tuple(x[:, :longest].clone() for x in (k, v)), list(lengths)

    def reorder(self, rows: Tensor) -> None:
        if not self.data:
            return
        index, chosen = row_indices(rows, self.data[0].device)
        self.data = tuple(x.index_select(0, index) for x in self.data)
        self.lengths = [self.lengths[row] if row >= 0 else 0 for row in chosen]

    def num_bytes(self) -> int:
        return sum(
            length * x[0, 0].numel() * x.element_size() for x in self.data if x.numel() for length in self.lengths
        )


def _right_aligned(rows: list[Tensor]) -> Tensor:
    """Rows [m_r, g, d] of different lengths as one tensor [b, max m, g, d], zeros in front."""
    longest = max(row.shape[0] for row in rows)
    return torch.stack([torch.cat([row.new_zeros(longest - len(row), *row.shape[1:]), row]) for row in rows])
