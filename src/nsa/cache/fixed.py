"""What static and paged caches share: memory at fixed addresses (`CacheTensors`), and the host's books about it.

Two ways in. `append` takes any number of tokens and returns views, for prefill: it knows the rows' lengths on the host.
A decoding step takes up to `max_new` tokens and needs nothing from the host but `make_room`: the lengths are on the
device, and `nsa.ops.decode` writes and reads the tensors, so that the step can be captured in a CUDA graph. A row may
sit a step out there, which the host does not see; from then on it keeps an upper bound, and asks the device for the
lengths when it must know them.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nsa.cache.layer import CacheContents, CacheViews, CompressRun, LayerCache
from nsa.cache.rings import after, left_aligned, read_rings, write_ring
from nsa.cache_tensors import CacheTensors
from nsa.config import NSAConfig

# A chunk of so many tokens has its keys copied side by side, one layer's at a time: the kernels for Hopper read them
# by TMA, which does not take the heads' distance in a cache, and such a chunk is worth a copy.
COPY_FROM = 1024


@dataclass
class _Before:
    """What a transaction goes back to."""

    tensors: CacheTensors | None
    bounds: list[int]
    exact: bool
    longest: list[int]
    lengths: Tensor | None  # the device's, where the host does not know them
    rings: tuple[Tensor, ...] | None = None  # copies, once more than max_new tokens have come


class FixedNSACache(LayerCache):
    """See `StaticNSACache` and `PagedNSACache`. Inference only: tensors that need gradients are an error."""

    def __init__(self, config: NSAConfig, *, max_crop: int = 64, max_new: int = 16) -> None:
        super().__init__(config, max_crop=max_crop)
        if max_new < 1:
            raise ValueError(f"cache: expected max_new >= 1, got {max_new}")
        self.max_new = max_new
        self._tensors: CacheTensors | None = None
        self._bounds: list[int] = []  # no row is longer
        self._exact = True  # and these are the lengths
        # Position from which on a row's rings were written; the rings themselves forget more.
        self._first_window: list[int] = []
        self._first_raw: list[int] = []
        # The longest that a row has been: what is further behind than the ring is long has been overwritten.
        self._longest: list[int] = []

    # ---- what a layout decides ---------------------------------------------------------------------------

    @abstractmethod
    def _new_tensors(
        self, rows: int, num_kv_heads: int, head_dim: int, v_head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> CacheTensors:
        """Memory of a cache without tokens."""

    @abstractmethod
    def _give_room(self, starts: list[int], ends: list[int]) -> None:
        """Let row r take tokens at positions starts[r] .. ends[r] - 1, or raise ValueError before anything changes."""

    @abstractmethod
    def _reorder_pages(self, rows: list[int], index: Tensor, tensors: CacheTensors, fresh: CacheTensors) -> None:
        """Give the rows of `fresh` the pages of the rows of `tensors`; the two are one where the rows are as many."""

    def _took_back(self) -> None:
        """Rows have become shorter."""

    def _gave_memory_up(self) -> None:
        """There are no tensors any more."""

    # ---- state --------------------------------------------------------------------------------------------

    @property
    def tensors(self) -> CacheTensors:
        """The memory. A new object replaces it when the number of rows changes; else its addresses stay."""
        if self._tensors is None:
            raise ValueError(f"{type(self).__name__}: it has no memory yet; expected `allocate` or `append` first")
        return self._tensors

    @property
    def is_allocated(self) -> bool:
        return self._tensors is not None

    @property
    def num_rows(self) -> int:
        return len(self._bounds)

    def can_step(self, t: int) -> bool:
        """Whether t new tokens are a decoding step rather than a prefill."""
        return self.is_allocated and t <= self.max_new

    @property
    def lengths(self) -> list[int]:
        if not self._exact:
            self.know_lengths(self.tensors.lengths.tolist())
        return list(self._bounds)

    def know_lengths(self, lengths: list[int]) -> None:
        """Tell the host the lengths, where they are known already (from another layer), so that it need not ask."""
        self._bounds, self._exact = list(lengths), True

    def ask_lengths(self) -> None:
        """Tell the host that its numbers are no more than bounds: it will ask the device when it needs the lengths."""
        self._exact = False

    def allocate(
        self, rows: int, num_kv_heads: int, head_dim: int, v_head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Take the memory now, with `rows` empty rows; else the first append does."""
        self._tensors = self._new_tensors(rows, num_kv_heads, head_dim, v_head_dim, dtype, device)
        self._set_rows([0] * rows, [0] * rows, [0] * rows)

    def _set_rows(self, lengths: list[int], first_window: list[int], first_raw: list[int]) -> None:
        self.know_lengths(lengths)
        self._longest = list(lengths)
        self._first_window, self._first_raw = first_window, first_raw

    # ---- a decoding step ------------------------------------------------------------------------------------

    def make_room(self, t: int, counts: Tensor | None = None) -> None:
        """Prepare for a decoding step of t columns a row; call it before the step, which advances the lengths.

        Nothing here waits for the device, unless the room seems to be used up and rows have sat steps out.

        Args:
            t: new tokens of each row, at most max_new.
            counts: how many of the t columns are tokens in each row, on the device, where rows take fewer.

        Raises:
            ValueError: no room, or t > max_new; the cache is then what it was.
        """
        if t > self.max_new:
            raise ValueError(f"{type(self).__name__}: expected at most max_new={self.max_new} new tokens, got {t}")
        starts, exact = self._bounds, self._exact and counts is None
        ends = [length + t for length in starts]
        try:
            self._give_room(starts, ends)
        except ValueError:
            if exact:
                raise
            # With the numbers themselves in place of their bounds, and without what rows took for steps they sat out.
            starts, exact = self.lengths, True
            new = [t] * len(starts) if counts is None else counts.tolist()
            ends = [length + count for length, count in zip(starts, new, strict=True)]
            self._took_back()
            self._give_room(starts, ends)
        self._keep_rings(ends)
        self._bounds, self._exact = ends, exact

    # ---- tokens of a prefill ----------------------------------------------------------------------------------

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
        if torch.is_grad_enabled() and any(x.requires_grad for x in (k, v, k_win, v_win, k_raw, v_raw)):
            raise ValueError(f"{type(self).__name__} is for inference: expected torch.no_grad(), got a graph")
        memory = () if self._tensors is None else (self._tensors.k, self._tensors.v)
        pairs, counts = self._as_kept((k, v, k_win, v_win, k_raw, v_raw), counts, memory)
        with self.transaction():
            if self._tensors is None:
                b, _, g, d = k.shape
                self.allocate(b, g, d, v.shape[-1], pairs[0].dtype, k.device)
            return self._append(*pairs, compress_run, counts)

    def _append(
        self, k: Tensor, v: Tensor, k_win: Tensor, v_win: Tensor, k_raw: Tensor, v_raw: Tensor,
        compress_run: CompressRun, counts: list[int],
    ) -> CacheViews:  # fmt: skip
        starts, t = self.lengths, k.shape[1]
        ends = [start + count for start, count in zip(starts, counts, strict=True)]
        self._took_back()  # what rows took for steps that they then sat out
        self._give_room(starts, ends)
        self._keep_rings(ends)

        tensors = self.tensors
        runs = _runs(starts, counts)
        windows = [self._window_run(tensors, run, k_win, v_win, starts, counts) for run in runs]
        for run in runs:
            start, count = starts[run.start], counts[run.start]
            new = slice(t - count, t)
            if count:
                self._write_pages(tensors.k, tensors.v, run, start, k[run, new], v[run, new])
                self._compress(tensors, run, start, count, k_raw[run, new], v_raw[run, new], compress_run)
                if tensors.k_win is not None and tensors.v_win is not None:
                    write_ring(tensors.k_win, run, start, k_win[run, new])
                    write_ring(tensors.v_win, run, start, v_win[run, new])
                write_ring(tensors.k_raw, run, start, k_raw[run, new])
                write_ring(tensors.v_raw, run, start, v_raw[run, new])
        _write_lengths(tensors.lengths, ends)
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
            return CacheViews(k_slc, v_slc, k_cmp, v_cmp, k_slc, v_slc, seqlens, seqlens)
        k_near, v_near = (left_aligned([pair[i] for pair in windows], runs) for i in (0, 1))
        near = [windows[i][0].shape[1] for i, run in enumerate(runs) for _ in range(run.start, run.stop)]
        seqlens_win = None if uniform else torch.tensor(near, device=k.device)
        return CacheViews(k_slc, v_slc, k_cmp, v_cmp, k_near, v_near, seqlens, seqlens_win)

    def _window_run(
        self, tensors: CacheTensors, run: slice, k: Tensor, v: Tensor, starts: list[int], counts: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Window keys and values of rows of one length: those of before, w - 1 at most, and the new ones."""
        start, count, t = starts[run.start], counts[run.start], k.shape[1]
        if tensors.k_win is None or tensors.v_win is None:
            return k[run, :0], v[run, :0]
        first = max(0, start - self.config.window_size + 1)
        k_near, v_near = (
            after(ring, run, first, start, x[run, t - count :]) for ring, x in ((tensors.k_win, k), (tensors.v_win, v))
        )
        return k_near, v_near

    def _compress(
        self, tensors: CacheTensors, run: slice, start: int, count: int, k: Tensor, v: Tensor, compress_run: CompressRun
    ) -> None:
        """Compress the blocks of rows of one length that `count` new raw tokens after `start` complete."""
        have, want = (self.config.num_compressed_blocks(length) for length in (start, start + count))
        if have == want:
            return
        first = have * self.config.compress_stride
        until = (want - 1) * self.config.compress_stride + self.config.compress_block_size
        k, v = (
            after(ring, run, first, start, x)[:, : until - first]
            for ring, x in ((tensors.k_raw, k), (tensors.v_raw, v))
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

    # ---- all or nothing -------------------------------------------------------------------------------------------

    def _before(self) -> Any:
        lengths = None if self._tensors is None or self._exact else self._tensors.lengths.clone()
        return _Before(self._tensors, self._bounds, self._exact, self._longest, lengths)

    def _keep_rings(self, ends: list[int]) -> None:
        """Before rows take tokens up to `ends`: what open transactions go back to must not be overwritten.

        A row's last max_new tokens overwrite nothing that could be needed again without them.
        """
        tensors, copies = self.tensors, None
        for before in self._open:
            many = any(end - bound > self.max_new for end, bound in zip(ends, before.bounds, strict=False))
            if before.rings is None and many and max(before.bounds) > 0:
                copies = copies or tuple(ring.clone() for ring in _rings(tensors))
                before.rings = copies
                before.longest = [max(pair) for pair in zip(before.longest, self._bounds, strict=True)]

    @torch.no_grad()
    def _go_back(self, before: _Before) -> None:
        if before.tensors is None:
            self._tensors, self._bounds, self._exact, self._longest = None, [], True, []
            self._gave_memory_up()
            return
        tensors, longest = before.tensors, self._bounds
        if before.rings is not None:
            longest = before.longest
            for ring, copy in zip(_rings(tensors), before.rings, strict=True):
                ring.copy_(copy)
        tensors.arrivals.zero_()
        if before.lengths is None:
            _write_lengths(tensors.lengths, before.bounds)
        else:
            tensors.lengths.copy_(before.lengths)
        self._bounds, self._exact = before.bounds, before.exact
        self._longest = [max(pair) for pair in zip(before.longest, longest, strict=True)]
        self._took_back()

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
        for old, new in zip(_rings(tensors), _rings(fresh), strict=True):
            _heads_first(new).copy_(_heads_first(old).index_select(0, index))
        lengths, first_window, first_raw = (
            [values[row] if row >= 0 else 0 for row in chosen] for values in (lengths, first_window, first_raw)
        )
        _write_lengths(fresh.lengths, lengths)
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

    @abstractmethod
    def _with_rows(self, tensors: CacheTensors, rows: int) -> CacheTensors:
        """Memory for another number of rows; a pool of pages stays."""

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
        _write_lengths(tensors.lengths, c.lengths)
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


def _rings(tensors: CacheTensors) -> list[Tensor]:
    rings = (tensors.k_win, tensors.v_win, tensors.k_raw, tensors.v_raw)
    return [ring for ring in rings if ring is not None]


def _write_lengths(lengths: Tensor, values: Sequence[int]) -> None:
    """Numbers of the host; where all rows have one, nothing waits for the device."""
    if values and len(set(values)) == 1:
        lengths.fill_(values[0])
    else:
        lengths.copy_(torch.tensor(values, dtype=torch.int32))


def _heads_first(x: Tensor) -> Tensor:
    """[.., tokens, heads, dim] as it lies in memory."""
    return x.transpose(1, 2)
