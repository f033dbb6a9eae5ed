"""The memory of one layer's cache as device tensors of a fixed size, which the decoding kernels read and write.

    k, v           rotated keys, and values, of the selection branch      pages of tokens
    k_cmp, v_cmp   compressed keys (rotated) and values                   in the page of their block's last token
    k_win, v_win   keys (rotated) and values of the window branch         a ring for each row
    k_raw, v_raw   what compression has still to read, not rotated        a ring for each row
    block_table    page of each run of page_size tokens of each row
    lengths        tokens of each row
    arrivals       counters of the kernels, at 0 between two of them

A static cache is one page a row; a paged cache is a pool of pages that rows may share. Both are the same tensors and
the same addresses.

**Addresses.** The token at position p of a row lies in page block_table[row, p // page_size], place p % page_size; in
a ring in slot p % ring. Compressed block i ends with token i d + l - 1, the last of stride number

    c = i + l/d - 1

and lies in page block_table[row, c // (page_size/d)], place c % (page_size/d). So the first l/d - 1 places of a row
hold nothing, the query at position p sees the places l/d - 1 <= c < (p + 1) // d, and what a page holds depends on no
token after it: rows that share a prefix of whole pages share its compressed keys and values too.

Everything is indexed [page or row, token, head, dim]; in memory the heads of a page or ring come before its tokens, so
that a head's keys are contiguous.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from nsa.config import NSAConfig
from nsa.decode_step import DecodeStep
from nsa.shapes import bind
from nsa.streams import Branches

# Page sizes and rings are multiples of this, so that every row of keys begins where wide loads may begin.
ALIGNMENT = 16


@dataclass(frozen=True)
class CacheTensors:
    """See the module. `k_win` and `v_win` are None with shared keys and values: the window then reads k and v.

    A row of length 0 is legal, also in a batch with others, and so is a row without pages (-1 in its block table):
    nothing may be appended to it.

    With `window_table` and `raw_table` there are no rings: k_win, v_win, k_raw and v_raw [pages, tokens, g, .] are
    pages too, no smaller than a block l, and the token at position p lies where these tables say, as in k and v.
    Appending then zeroes the places of the strides that end no block: what was there before may not be finite.
    """

    k: Float[Tensor, "pages page_size g d"]
    v: Float[Tensor, "pages page_size g e"]
    k_cmp: Float[Tensor, "pages page_strides g d"]
    v_cmp: Float[Tensor, "pages page_strides g e"]
    k_win: Float[Tensor, "rows ring g d"] | None
    v_win: Float[Tensor, "rows ring g e"] | None
    k_raw: Float[Tensor, "rows raw_ring g d"]
    v_raw: Float[Tensor, "rows raw_ring g e"]
    block_table: Int32[Tensor, "rows pages_per_row"]
    lengths: Int32[Tensor, " rows"]
    arrivals: Int32[Tensor, "rows g 16"]
    window_table: Int32[Tensor, "rows window_pages"] | None = None  # where k_win and v_win are pages and no rings
    raw_table: Int32[Tensor, "rows raw_pages"] | None = None  # where k_raw and v_raw are

    @property
    def rows(self) -> int:
        return self.lengths.shape[0]

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        return self.k.shape[1]

    @property
    def capacity(self) -> int:
        """Tokens that a row's block table can address."""
        return self.block_table.shape[1] * self.page_size

    def num_bytes(self) -> int:
        """Bytes allocated for keys and values."""
        pairs = (self.k, self.v, self.k_cmp, self.v_cmp, self.k_win, self.v_win, self.k_raw, self.v_raw)
        return sum(x.numel() * x.element_size() for x in pairs if x is not None)

    def check_tokens(self, config: NSAConfig, new: Branches, step: DecodeStep) -> None:
        """ValueError where the step's tokens cannot be appended; asks nothing of the device."""
        if (self.raw_table is None) != (self.window_table is None) and not config.shared_kv:
            raise ValueError("append_tokens: expected window_table and raw_table, or rings and neither, got one")
        if self.raw_table is not None and self.k_raw.shape[1] < config.compress_block_size:
            raise ValueError(
                f"append_tokens: expected pages of raw tokens of at least l={config.compress_block_size}, "
                f"got {self.k_raw.shape[1]}"
            )
        names = {"cmp": new.cmp, "slc": new.slc} if self.k_win is None else new._asdict()
        suffix = {"cmp": "_raw", "slc": "", "win": "_win"}
        given = {"lengths": (self.lengths, "b"), "the cache's k": (self.k, "pages n g d")}
        given |= {"the cache's v": (self.v, "pages n g e")}
        for name in sorted(names, key="slc win cmp".index):
            given[f"k{suffix[name]}"] = (names[name].k, "b t g d")
            given[f"v{suffix[name]}"] = (names[name].v, "b t g e")
        tokens = list(given)[3:]
        given |= {"cos_cmp": (step.cos_cmp, "b new d"), "sin_cmp": (step.sin_cmp, "b new d")}
        found = bind("append_tokens", **given)
        most = -(-found["t"] // config.compress_stride)
        if found["new"] != most:
            raise ValueError(f"append_tokens: cos_cmp should have shape [b, {most}, d], got {list(step.cos_cmp.shape)}")
        # A ring keeps what the first of the new tokens reads beside them.
        at_once = self.k_raw.shape[1] - config.compress_block_size + 1
        if self.k_win is not None:
            at_once = min(at_once, self.k_win.shape[1] - config.window_size + 1)
        if self.raw_table is None and found["t"] > at_once:
            raise ValueError(f"append_tokens: expected at most {at_once} tokens at a time, got {found['t']}")
        for name in tokens:
            if given[name][0].dtype != self.k.dtype:
                raise ValueError(_wrong_dtype("append_tokens", name, given[name][0], self))
        _check_counts("append_tokens", step.counts, found["b"])

    def check_queries(self, config: NSAConfig, q: Tensor, gates: Tensor, counts: Tensor | None) -> None:
        """ValueError where these queries cannot attend; asks nothing of the device."""
        found = bind(
            "decode_attention", lengths=(self.lengths, "b"), k=(self.k, "pages n g d"), v=(self.v, "pages n g e"),
            q=(q, "b t h d"), gates=(gates, "b t h 3"),
        )  # fmt: skip
        ring = None if self.k_win is None or self.window_table is not None else self.k_win.shape[1]
        if ring is not None and found["t"] > (at_once := ring - config.window_size + 1):
            raise ValueError(f"decode_attention: expected at most {at_once} queries, got {found['t']}")
        if q.dtype != self.k.dtype:
            raise ValueError(_wrong_dtype("decode_attention", "q", q, self))
        _check_counts("decode_attention", counts, found["b"])


@dataclass(frozen=True, kw_only=True)
class Pages:
    """The sizes of a pool of pages.

    num_pages: pages of the pool.
    page_size: tokens in a page; a multiple of l' and of 16.
    pages_per_row: entries of the block table, so that a row may hold pages_per_row * page_size tokens.
    """

    num_pages: int
    page_size: int
    pages_per_row: int


@torch.inference_mode(False)  # a cache outlives the mode it was made in, and is written in place afterwards
def empty_cache_tensors(
    config: NSAConfig,
    pages: Pages,
    *,
    rows: int,
    num_kv_heads: int,
    head_dim: int,
    v_head_dim: int,
    max_new: int,
    max_crop: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> CacheTensors:
    """Tensors of a cache without tokens, every entry of the block table -1.

    Args:
        config: block sizes of the layer.
        pages: sizes of the pool.
        rows: sequences.
        num_kv_heads, head_dim, v_head_dim: g, d and e.
        max_new: tokens that come in one decoding step, at most; the rings keep as many more.
        max_crop: tokens that may be taken back; the rings keep as many more.

    Raises:
        ValueError: a size that is not positive, or a page size that does not fit the blocks.
    """
    page_size = pages.page_size
    sizes = {"rows": rows, "num_pages": pages.num_pages, "pages_per_row": pages.pages_per_row, "max_new": max_new}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"cache: expected {name} >= 1, got {size}")
    if max_crop < 0:
        raise ValueError(f"cache: expected max_crop >= 0, got {max_crop}")
    if page_size < 1 or page_size % config.select_block_size or page_size % ALIGNMENT:
        raise ValueError(
            f"cache: page_size should be a multiple of select_block_size={config.select_block_size} and of "
            f"{ALIGNMENT}, got {page_size}"
        )

    def pair(first: int, tokens: int) -> tuple[Tensor, Tensor]:
        # Heads before tokens in memory. Zeros, not whatever lay there: kernels may load places that they mask.
        k, v = (
            torch.zeros(first, num_kv_heads, tokens, width, dtype=dtype, device=device).transpose(1, 2)
            for width in (head_dim, v_head_dim)
        )
        return k, v

    ring = _aligned(config.window_size + max_new - 1 + max_crop)
    raw_ring = _aligned(config.compress_block_size + max_new - 1 + max_crop)
    k, v = pair(pages.num_pages, page_size)
    k_cmp, v_cmp = pair(pages.num_pages, page_size // config.compress_stride)
    k_win, v_win = (None, None) if config.shared_kv else pair(rows, ring)
    k_raw, v_raw = pair(rows, raw_ring)
    block_table = torch.full((rows, pages.pages_per_row), -1, dtype=torch.int32, device=device)
    lengths = torch.zeros(rows, dtype=torch.int32, device=device)
    arrivals = torch.zeros(rows, num_kv_heads, 16, dtype=torch.int32, device=device)
    return CacheTensors(k, v, k_cmp, v_cmp, k_win, v_win, k_raw, v_raw, block_table, lengths, arrivals)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def as_computed(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under `torch.autocast` in its dtype, as it casts the arguments of an operation (fp64 stays); else as they are."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _wrong_dtype(op: str, name: str, x: Tensor, tensors: CacheTensors) -> str:
    return (
        f"{op}: the cache holds {tensors.k.dtype}, expected {name} of that dtype, got {x.dtype} "
        "(each call over one cache under autocast, or none)"
    )


def _check_counts(op: str, counts: Tensor | None, b: int) -> None:
    if counts is not None and (counts.shape != (b,) or counts.dtype not in (torch.int32, torch.int64)):
        raise ValueError(f"{op}: counts should be int32 [b={b}], got {counts.dtype} {list(counts.shape)}")
