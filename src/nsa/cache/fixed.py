"""What static and paged caches share: tokens into their memory, views out of it, and moving what it holds.

`update` takes any number of tokens and returns views, for prefill: it knows the rows' lengths on the host. A decoding
step goes by the device alone (`nsa.cache.fixed_memory`).
"""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from nsa.cache.fixed_memory import FixedMemory, rings_of, write_lengths
from nsa.cache.layer import CacheContents, CompressRun
from nsa.cache.rings import after, left_aligned, read_rings, write_ring
from nsa.cache_tensors import CacheTensors
from nsa.streams import Branches, Stream

# A chunk of so many tokens has its keys copied side by side, one layer's at a time: the kernels for Hopper read them
# by TMA, which does not take the heads' distance in a cache, and such a chunk is worth a copy.
COPY_FROM = 1024


class FixedNSACache(FixedMemory):
    """See `StaticNSACache` and `PagedNSACache`. Inference only: tensors that need gradients are an error."""

    # ---- what a layout decides ---------------------------------------------------------------------------

    @abstractmethod
    def _reorder_pages(self, rows: list[int], index: Tensor, tensors: CacheTensors, fresh: CacheTensors) -> None:
        """Give the rows of `fresh` the pages of the rows of `tensors`; the two are one where the rows are as many."""

    @abstractmethod
    def _with_rows(self, tensors: CacheTensors, rows: int) -> CacheTensors:
        """Memory for another number of rows; a pool of pages stays."""

    # ---- tokens of a prefill ----------------------------------------------------------------------------------

    def update(self, new: Branches, compress_run: CompressRun, *, counts: list[int] | None = None) -> Branches:
        if torch.is_grad_enabled() and any(x.requires_grad for x in new.tensors):
            raise ValueError(f"{type(self).__name__} is for inference: expected torch.no_grad(), got a graph")
        memory = () if self._tensors is None else (self._tensors.k, self._tensors.v)
        new, counts = self._as_kept(new, counts, memory)
        with self.transaction():
            if self._tensors is None:
                b, _, g, d = new.slc.k.shape
                self.allocate(b, g, d, new.slc.v.shape[-1], new.slc.k.dtype, new.slc.k.device)
            return self._update(new, compress_run, counts)

    def _update(self, new: Branches, compress_run: CompressRun, counts: list[int]) -> Branches:
        cmp, slc, win = new
        k, v = slc.k, slc.v
        starts, t = self.lengths, k.shape[1]
        ends = [start + count for start, count in zip(starts, counts, strict=True)]
        self._took_back()  # what rows took for steps that they then sat out
        self._give_room(starts, ends)
        self._keep_rings(ends)

        tensors = self.tensors
        runs = _runs(starts, counts)
        windows = [self._window_run(tensors, run, win, starts, counts) for run in runs]
        for run in runs:
            start, count = starts[run.start], counts[run.start]
            at = (run, slice(t - count, t))
            if count:
                self._write_pages(tensors.k, tensors.v, run, start, k[at], v[at])
                self._compress(tensors, run, start, Stream(cmp.k[at], cmp.v[at]), compress_run)
                if tensors.k_win is not None and tensors.v_win is not None:
                    write_ring(tensors.k_win, run, start, win.k[at])
                    write_ring(tensors.v_win, run, start, win.v[at])
                write_ring(tensors.k_raw, run, start, cmp.k[at])
                write_ring(tensors.v_raw, run, start, cmp.v[at])
        write_lengths(tensors.lengths, ends)
        self.know_lengths(ends)
        self._longest = [max(pair) for pair in zip(self._longest, ends, strict=True)]

        longest = max(ends)
        uniform = len(set(ends)) == 1 and min(counts) == t
        seqlens = None if uniform else torch.tensor(ends, device=k.device)
        if uniform and longest == t:
            k_slc, v_slc = k, v  # all that there is
        else:
            k_slc, v_slc = self._read_tokens(tensors, longest)
        if k.is_cuda and t >= COPY_FROM:
            k_slc, v_slc = k_slc.contiguous(), v_slc.contiguous()
        k_cmp, v_cmp = self._read_compressed(tensors, longest)
        if tensors.k_win is None:
            tensors_of = (k_cmp, v_cmp, k_slc, v_slc, k_slc, v_slc)
            return Branches.of(self.config, tensors_of, (None, None, seqlens, seqlens))
        k_near, v_near = (left_aligned([pair[i] for pair in windows], runs) for i in (0, 1))
        near = [windows[i][0].shape[1] for i, run in enumerate(runs) for _ in range(run.start, run.stop)]
        seqlens_win = None if uniform else torch.tensor(near, device=k.device)
        tensors_of = (k_cmp, v_cmp, k_slc, v_slc, k_near, v_near)
        return Branches.of(self.config, tensors_of, (None, None, seqlens, seqlens_win))

    def _window_run(
        self, tensors: CacheTensors, run: slice, new: Stream, starts: list[int], counts: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Window keys and values of rows of one length: those of before, w - 1 at most, and the new ones."""
        k, v = new.k, new.v
        start, count, t = starts[run.start], counts[run.start], k.shape[1]
        if tensors.k_win is None or tensors.v_win is None:
            return k[run, :0], v[run, :0]
        first = max(0, start - self.config.window_size + 1)
        k_near, v_near = (
            after(ring, run, first, start, x[run, t - count :]) for ring, x in ((tensors.k_win, k), (tensors.v_win, v))
        )
        return k_near, v_near

    def _compress(self, tensors: CacheTensors, run: slice, start: int, new: Stream, compress_run: CompressRun) -> None:
        """Compress the blocks of rows of one length that new raw tokens after `start` complete."""
        ends = (start, start + new.k.shape[1])
        have, want = (self.config.num_compressed_blocks(length) for length in ends)
        if have == want:
            return
        first = have * self.config.compress_stride
        until = (want - 1) * self.config.compress_stride + self.config.compress_block_size
        k, v = (
            after(ring, run, first, start, x)[:, : until - first]
            for ring, x in ((tensors.k_raw, new.k), (tensors.v_raw, new.v))
        )
        k_cmp, v_cmp = (x.to(tensors.k.dtype) for x in compress_run(k, v, have))
        self._write_pages(tensors.k_cmp, tensors.v_cmp, run, have + self._first_place, k_cmp, v_cmp)

    @property
    def _first_place(self) -> int:
        """Place of a row's first compressed key: that of the stride with which its block ends."""
        return self.config.compress_block_size // self.config.compress_stride - 1

    # ---- pages: of tokens, or of compressed keys, which have fewer places ------------------------------------

    def _write_pages(self, k_pages: Tensor, v_pages: Tensor, run: slice, start: int, k: Tensor, v: Tensor) -> None:
        size = k_pages.shape[1]
        places = torch.arange(start, start + k.shape[1], device=k.device)
        pages = self.tensors.block_table[run][:, places // size]
        k_pages[pages, places % size] = k
        v_pages[pages, places % size] = v

    def _read_tokens(self, tensors: CacheTensors, longest: int) -> tuple[Tensor, Tensor]:
        k, v = (self._read_pages(pages, longest)[:, :longest] for pages in (tensors.k, tensors.v))
        return k, v

    def _read_compressed(self, tensors: CacheTensors, longest: int) -> tuple[Tensor, Tensor]:
        first = self._first_place
        last = first + self.config.num_compressed_blocks(longest)
        k, v = (self._read_pages(pages, last)[:, first:last] for pages in (tensors.k_cmp, tensors.v_cmp))
        return k.contiguous(), v.contiguous()

    def _read_pages(self, pages: Tensor, places: int) -> Tensor:
        """The rows' first `places` places or more, [rows, .., g, .]; behind the last one that a row has, anything."""
        table = self.tensors.block_table
        count = -(-places // pages.shape[1])
        return pages[table[:, :count].clamp(min=0)].flatten(1, 2)

    # ---- taking back, reordering, moving ------------------------------------------------------------------------

    def _first_remembered(self) -> tuple[list[int], list[int]]:
        """Position of the oldest token in each row's window and raw tokens."""
        tensors = self.tensors
        longest = [max(pair) for pair in zip(self._longest, self.lengths, strict=True)]
        raw_ring = tensors.k_raw.shape[1]
        raw = [max(first, length - raw_ring) for first, length in zip(self._first_raw, longest, strict=True)]
        if tensors.k_win is None:
            return [0] * tensors.rows, raw
        ring = tensors.k_win.shape[1]
        return [max(first, length - ring) for first, length in zip(self._first_window, longest, strict=True)], raw

    def crop(self, num_tokens: int) -> None:
        first_window, first_raw = self._first_remembered() if self.is_allocated else ([], [])
        self._check_crop(num_tokens, first_window, first_raw)
        if num_tokens == 0:
            return
        self._longest = [max(pair) for pair in zip(self._longest, self.lengths, strict=True)]
        self.tensors.lengths.sub_(num_tokens)
        self.know_lengths([length - num_tokens for length in self._bounds])
        self._took_back()

    def reorder(self, rows: Tensor) -> None:
        if not self.is_allocated:
            return
        tensors, lengths = self.tensors, self.lengths
        index, chosen = self._rows_from(rows, tensors.lengths.device)
        first_window, first_raw = self._first_remembered()
        fresh = tensors
        if len(chosen) != tensors.rows:
            fresh = self._with_rows(tensors, len(chosen))
        self._reorder_pages(chosen, index, tensors, fresh)
        for old, new in zip(rings_of(tensors), rings_of(fresh), strict=True):
            _heads_first(new).copy_(_heads_first(old).index_select(0, index))
        lengths, first_window, first_raw = (
            [values[row] if row >= 0 else 0 for row in chosen] for values in (lengths, first_window, first_raw)
        )
        write_lengths(fresh.lengths, lengths)
        self._tensors = fresh
        longest = [self._longest[row] if row >= 0 else 0 for row in chosen]
        self._set_rows(lengths, first_window, first_raw)
        self._longest = longest

    def clear(self) -> None:
        if self.is_allocated:
            rows = self.tensors.rows
            self.tensors.lengths.zero_()
            self._set_rows([0] * rows, [0] * rows, [0] * rows)
            self._took_back()

    def contents(self) -> CacheContents | None:
        if not self._bounds:
            return None
        tensors, lengths = self.tensors, self.lengths
        first_window, first_raw = self._first_remembered()
        longest = max(lengths)
        k, v = self._read_tokens(tensors, longest)
        if tensors.k_win is None or tensors.v_win is None:
            k_win, v_win, first_window = k, v, [0] * len(lengths)
        else:
            k_win, v_win = (read_rings(ring, first_window, lengths) for ring in (tensors.k_win, tensors.v_win))
        k_raw, v_raw = (read_rings(ring, first_raw, lengths) for ring in (tensors.k_raw, tensors.v_raw))
        window_lengths, raw_lengths = (
            [max(0, length - first) for length, first in zip(lengths, firsts, strict=True)]
            for firsts in (first_window, first_raw)
        )
        k_cmp, v_cmp = self._read_compressed(tensors, longest)
        return CacheContents(
            lengths, k, v, k_cmp, v_cmp, window_lengths, k_win, v_win, raw_lengths, k_raw, v_raw
        )  # fmt: skip

    def fill(self, contents: CacheContents) -> None:
        c = contents
        rows, _, g, d = c.k.shape
        old = self.__dict__.copy()
        try:
            self.allocate(rows, g, d, c.v.shape[-1], c.k.dtype, c.k.device)
            self._give_room([0] * rows, c.lengths)
            self._write(c)
        except BaseException:
            self.__dict__ = old
            raise

    def _write(self, c: CacheContents) -> None:
        tensors = self.tensors
        rings = [(tensors.k_raw, c.k_raw, c.raw_lengths), (tensors.v_raw, c.v_raw, c.raw_lengths)]
        if tensors.k_win is not None and tensors.v_win is not None:
            rings += [(tensors.k_win, c.k_win, c.window_lengths), (tensors.v_win, c.v_win, c.window_lengths)]
        for row, length in enumerate(c.lengths):
            run = slice(row, row + 1)
            blocks = self.config.num_compressed_blocks(length)
            self._write_pages(tensors.k, tensors.v, run, 0, c.k[run, :length], c.v[run, :length])
            compressed = (c.k_cmp[run, :blocks], c.v_cmp[run, :blocks])
            self._write_pages(tensors.k_cmp, tensors.v_cmp, run, self._first_place, *compressed)
            for ring, x, kept in rings:
                write_ring(ring, run, length - kept[row], x[run, : kept[row]])
        write_lengths(tensors.lengths, c.lengths)
        firsts = [
            [length - kept for length, kept in zip(c.lengths, lengths, strict=True)]
            for lengths in (c.window_lengths, c.raw_lengths)
        ]
        self._set_rows(list(c.lengths), *firsts)


def _runs(starts: Sequence[int], counts: Sequence[int]) -> list[slice]:
    """Rows that may be handled together: all, where they have one length and one count; else each by itself."""
    rows = len(starts)
    if rows and len(set(starts)) == 1 and len(set(counts)) == 1:
        return [slice(0, rows)]
    return [slice(row, row + 1) for row in range(rows)]


def _heads_first(x: Tensor) -> Tensor:
    """[.., tokens, heads, dim] as it lies in memory."""
    return x.transpose(1, 2)
