"""A cache in pages: rows take them as they grow, and share those of a common prefix."""

from dataclasses import replace

import torch
from torch import Tensor

from nsa.cache.fixed import FixedNSACache
from nsa.cache_tensors import CacheTensors, Pages, empty_cache_tensors
from nsa.config import NSAConfig


class PageTable:
    """Which page holds what of which row: a free list, reference counts, and a list of pages for each row.

    All of it is on the host; the cache mirrors the rows' lists in its block table.
    """

    def __init__(self, num_pages: int, rows: int) -> None:
        self.free = list(range(num_pages - 1, -1, -1))  # the lowest page goes first
        self.references = [0] * num_pages
        self.rows: list[list[int]] = [[] for _ in range(rows)]

    @property
    def num_used(self) -> int:
        return len(self.references) - len(self.free)

    def take(self) -> int:
        page = self.free.pop()
        self.references[page] = 1
        return page

    def give_back(self, page: int) -> None:
        self.references[page] -= 1
        if not self.references[page]:
            self.free.append(page)

    def reorder(self, rows: list[int]) -> None:
        """Row i becomes what row rows[i] was; -1 is an empty row."""
        before = self.rows
        self.rows = [list(before[row]) if row >= 0 else [] for row in rows]
        for pages in self.rows:
            for page in pages:
                self.references[page] += 1
        for pages in before:
            for page in pages:
                self.give_back(page)

    def shorten(self, row: int, count: int) -> None:
        """Keep the first `count` pages of a row."""
        while len(self.rows[row]) > count:
            self.give_back(self.rows[row].pop())


class PagedNSACache(FixedNSACache):
    """A pool of pages of `page_size` tokens that rows take as they grow, at fixed addresses.

    `reorder` shares pages: `reorder(torch.tensor([0, 0, 0]))` makes three rows of one, whose pages, compressed keys and
    values included, lie in memory once. A page that several rows hold is copied for the row that writes into it next:
    of a shared prefix the last page, where it is partly filled, and no other. Window and raw tokens are each row's own.

    Args:
        config: block sizes and counts of the layer.
        num_pages: pages of the pool.
        page_size: tokens in a page, a multiple of l' and of 16.
        max_length: tokens that a row may hold, by default as many as the pool; decoding is planned for that many.
        max_crop: how many tokens `crop` can take back.
        max_new: tokens of a decoding step, at most (prefill takes any number).

    Raises:
        ValueError: from `append`, `make_room` and `fill` when the pages run out or a row would pass max_length; the
            cache is then what it was.
    """

    def __init__(
        self,
        config: NSAConfig,
        num_pages: int,
        *,
        page_size: int = 256,
        max_length: int | None = None,
        max_crop: int = 64,
        max_new: int = 16,
    ) -> None:
        super().__init__(config, max_crop=max_crop, max_new=max_new)
        if num_pages < 1 or (max_length is not None and max_length < 1):
            raise ValueError(
                f"PagedNSACache: expected num_pages and max_length of at least 1, got {num_pages} and {max_length}"
            )
        self.num_pages, self.page_size = num_pages, page_size
        self.max_length = num_pages * page_size if max_length is None else max_length
        self.table = PageTable(num_pages, 0)

    @property
    def num_pages_used(self) -> int:
        """Pages that hold tokens of some row; one that several rows share counts once."""
        return self.table.num_used

    def _new_tensors(
        self, rows: int, num_kv_heads: int, head_dim: int, v_head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> CacheTensors:
        per_row = -(-self.max_length // self.page_size)
        pages = Pages(num_pages=self.num_pages, page_size=self.page_size, pages_per_row=per_row)
        tensors = empty_cache_tensors(
            self.config, pages, rows=rows, num_kv_heads=num_kv_heads, head_dim=head_dim, v_head_dim=v_head_dim,
            max_new=self.max_new, max_crop=self.max_crop, dtype=dtype, device=device,
        )  # fmt: skip
        self.table = PageTable(self.num_pages, rows)
        return tensors

    def _give_room(self, starts: list[int], ends: list[int]) -> None:
        if max(ends, default=0) > self.max_length:
            raise ValueError(f"PagedNSACache: expected at most {self.max_length} tokens a row, got {max(ends)}")
        size, table = self.page_size, self.table
        # Pages into which tokens will be written: new ones, and shared ones, which all but their last holder copy.
        missing: list[tuple[int, int]] = []
        shared: list[tuple[int, int]] = []
        holders = dict[int, int]()
        for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
            for place in range(start // size, -(-end // size) if end > start else 0):
                if place >= len(table.rows[row]):
                    missing.append((row, place))
                    continue
                page = table.rows[row][place]
                if holders.setdefault(page, table.references[page]) > 1:
                    holders[page] -= 1
                    shared.append((row, place))
        if len(missing) + len(shared) > len(table.free):
            raise ValueError(
                f"PagedNSACache: out of pages: {len(missing) + len(shared)} more of {size} tokens are needed, "
                f"{len(table.free)} of {self.num_pages} are free"
            )
        copies = []
        for row, place in shared:
            old, new = table.rows[row][place], table.take()
            table.give_back(old)
            table.rows[row][place] = new
            copies.append((old, new))
        for row, place in missing:
            assert place == len(table.rows[row])
            table.rows[row].append(table.take())
        self._copy_pages(copies)
        for row, place in shared + missing:
            self.tensors.block_table[row, place] = table.rows[row][place]

    def _copy_pages(self, copies: list[tuple[int, int]]) -> None:
        if copies:
            tensors = self.tensors
            old, new = torch.tensor(copies, device=tensors.k.device).unbind(1)
            for x in (tensors.k, tensors.v, tensors.k_cmp, tensors.v_cmp):
                heads_first = x.transpose(1, 2)  # as it lies in memory
                heads_first.index_copy_(0, new, heads_first.index_select(0, old))

    def _took_back(self) -> None:
        for row, length in enumerate(self.lengths):
            count = -(-length // self.page_size)
            if count < len(self.table.rows[row]):
                self.table.shorten(row, count)
                self.tensors.block_table[row, count:] = -1

    def _gave_memory_up(self) -> None:
        self.table = PageTable(self.num_pages, 0)

    @torch.inference_mode(False)
    def _with_rows(self, tensors: CacheTensors, rows: int) -> CacheTensors:
        def more(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.new_zeros(rows, *x.transpose(1, 2).shape[1:]).transpose(1, 2)

        k_raw, v_raw = more(tensors.k_raw), more(tensors.v_raw)
        assert k_raw is not None
        assert v_raw is not None
        return replace(
            tensors, k_win=more(tensors.k_win), v_win=more(tensors.v_win), k_raw=k_raw, v_raw=v_raw,
            block_table=tensors.block_table.new_full((rows, tensors.block_table.shape[1]), -1),
            lengths=tensors.lengths.new_zeros(rows),
            arrivals=tensors.arrivals.new_zeros(rows, *tensors.arrivals.shape[1:]),
        )  # fmt: skip

    def _reorder_pages(self, rows: list[int], index: Tensor, tensors: CacheTensors, fresh: CacheTensors) -> None:
        self.table.reorder(rows)
        table = tensors.block_table.index_select(0, index)
        fresh.block_table.copy_(table)
        for row, source in enumerate(rows):
            if source < 0:
                fresh.block_table[row] = -1

    def num_bytes(self) -> int:
        """Of a pool's pages those in use, shared ones once."""
        if not self.is_allocated:
            return 0
        tensors = self.tensors
        pools = (tensors.k, tensors.v, tensors.k_cmp, tensors.v_cmp)
        page = sum(x[0].numel() * x.element_size() for x in pools)
        rings = (tensors.k_win, tensors.v_win, tensors.k_raw, tensors.v_raw)
        own = sum(x.numel() * x.element_size() for x in rings if x is not None)
        return page * self.num_pages_used + own
