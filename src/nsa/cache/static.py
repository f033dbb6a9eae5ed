"""A cache of fixed length: one page a row, all of it allocated at once."""

import math

import torch
from torch import Tensor

from nsa.cache.fixed import FixedNSACache
from nsa.cache_tensors import ALIGNMENT, CacheTensors, Pages, empty_cache_tensors
from nsa.config import NSAConfig


class StaticNSACache(FixedNSACache):
    """Room for `max_length` tokens a row at fixed addresses, as CUDA graphs and torch.compile want it.

    Args:
        config: block sizes and counts of the layer.
        max_length: tokens that a row may hold.
        max_crop: how many tokens `crop` can take back.
        max_new: tokens of a decoding step, at most (prefill takes any number).

    Raises:
        ValueError: from `append`, `make_room` and `fill` when a row would pass max_length; the cache is then what it
            was.
    """

    def __init__(self, config: NSAConfig, max_length: int, *, max_crop: int = 64, max_new: int = 16) -> None:
        super().__init__(config, max_crop=max_crop, max_new=max_new)
        if max_length < 1:
            raise ValueError(f"StaticNSACache: expected max_length >= 1, got {max_length}")
        self.max_length = max_length

    def _new_tensors(
        self, rows: int, num_kv_heads: int, head_dim: int, v_head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> CacheTensors:
        multiple = math.lcm(self.config.select_block_size, ALIGNMENT)
        pages = Pages(num_pages=rows, page_size=-(-self.max_length // multiple) * multiple, pages_per_row=1)
        tensors = empty_cache_tensors(
            self.config, pages, rows=rows, num_kv_heads=num_kv_heads, head_dim=head_dim, v_head_dim=v_head_dim,
            max_new=self.max_new, max_crop=self.max_crop, dtype=dtype, device=device,
        )  # fmt: skip
        tensors.block_table.copy_(torch.arange(rows, device=device)[:, None])
        return tensors

    def _give_room(self, starts: list[int], ends: list[int]) -> None:
        if max(ends, default=0) > self.max_length:
            raise ValueError(f"StaticNSACache: expected at most {self.max_length} tokens a row, got {max(ends)}")

    def _read_pages(self, pages: Tensor, places: int) -> Tensor:
        return pages  # page r is row r

    def _write_pages(self, k_pages: Tensor, v_pages: Tensor, run: slice, start: int, k: Tensor, v: Tensor) -> None:
        places = slice(start, start + k.shape[1])
        k_pages[run, places], v_pages[run, places] = k, v

    def _with_rows(self, tensors: CacheTensors, rows: int) -> CacheTensors:
        g, d, e = tensors.k.shape[2], tensors.k.shape[3], tensors.v.shape[3]
        return self._new_tensors(rows, g, d, e, tensors.k.dtype, tensors.k.device)

    def _reorder_pages(self, rows: list[int], index: Tensor, tensors: CacheTensors, fresh: CacheTensors) -> None:
        for name in ("k", "v", "k_cmp", "v_cmp"):
            old, new = (getattr(x, name).transpose(1, 2) for x in (tensors, fresh))  # as they lie in memory
            new.copy_(old.index_select(0, index))

    def num_bytes(self) -> int:
        return self.tensors.num_bytes() if self.is_allocated else 0
