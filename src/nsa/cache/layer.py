"""The interface of a layer's caches: append tokens, get what their queries may read; take back, reorder, count."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nsa.config import NSAConfig

# Maps raw keys and values [b, m, g, d] that begin at block `first` to the keys (rotated) and values of their blocks.
CompressRun = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class CacheViews:
    """Keys and values of the three branches, rows left-aligned, and the rows' lengths where they differ."""

    k: Float[Tensor, "b s g d"]
    v: Float[Tensor, "b s g e"]
    k_cmp: Float[Tensor, "b c g d"]
    v_cmp: Float[Tensor, "b c g e"]
    k_win: Float[Tensor, "b s_win g d"]
    v_win: Float[Tensor, "b s_win g e"]
    seqlens_k: Tensor | None
    seqlens_win: Tensor | None


@dataclass(frozen=True)
class CacheContents:
    """All that a cache remembers, rows left-aligned: of window and compression the last tokens of each row only."""

    lengths: list[int]
    k: Float[Tensor, "b s g d"]
    v: Float[Tensor, "b s g e"]
    k_cmp: Float[Tensor, "b c g d"]
    v_cmp: Float[Tensor, "b c g e"]
    window_lengths: list[int]
    k_win: Float[Tensor, "b s_win g d"]
    v_win: Float[Tensor, "b s_win g e"]
    raw_lengths: list[int]
    k_raw: Float[Tensor, "b s_raw g d"]
    v_raw: Float[Tensor, "b s_raw g e"]


class LayerCache(ABC):
    """The cache of one layer, in any layout.

    Args:
        config: block sizes and counts of the layer.
        max_crop: how many tokens `crop` can take back (speculative decoding); as many more raw tokens are kept
            for the window and for compression.
    """

    def __init__(self, config: NSAConfig, *, max_crop: int = 64) -> None:
        if max_crop < 0:
            raise ValueError(f"cache: expected max_crop >= 0, got {max_crop}")
        self.config, self.max_crop = config, max_crop

    @property
    @abstractmethod
    def lengths(self) -> list[int]:
        """Tokens seen by each row; empty before the first append."""

    @abstractmethod
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
        """Remember new tokens and return the keys and values that their queries may read.

        The views are good until the next call. One token or four thousand are the same call.

        Args:
            k, v: rotated keys, and values, of the selection branch.
            k_win, v_win: the same for the window branch.
            k_raw, v_raw: keys before rotation, and values, of the compressed branch.
            compress_run: compresses a run of raw tokens that begins at block `first`, keys rotated.
            counts: how many of the t columns are tokens in each row, its last ones; by default all.

        Raises:
            ValueError: another number of rows than before, or no room; the cache is then what it was.
        """

    @abstractmethod
    def crop(self, num_tokens: int) -> None:
        """Take back the last `num_tokens` tokens of every row, as if they had never come.

        Raises:
            ValueError: more than a row has, or more than is still remembered (at least max_crop). Nothing changes.
        """

    @abstractmethod
    def reorder(self, rows: Tensor) -> None:
        """Row i becomes what row rows[i] was (beam search), -1 an empty one; rows may repeat, or be fewer or more."""

    @abstractmethod
    def clear(self) -> None:
        """Forget all tokens; static and paged caches keep their memory, at its addresses, and the number of rows."""

    @abstractmethod
    def num_bytes(self) -> int:
        """Bytes of keys and values: those remembered (growing), the whole memory (static), pages in use (paged)."""

    @abstractmethod
    def contents(self) -> CacheContents | None:
        """All that is remembered; None before the first append."""

    @abstractmethod
    def fill(self, contents: CacheContents) -> None:
        """Remember `contents` and nothing else.

        Raises:
            ValueError: no room; the cache is then what it was.
        """

    def check_rows(self, b: int) -> None:
        """ValueError where the next tokens are of another number of rows than before."""
        if self.lengths and len(self.lengths) != b:
            raise ValueError(f"{type(self).__name__}: expected {len(self.lengths)} rows as before, got {b}")

    def _check_crop(self, num_tokens: int, first_window: list[int], first_raw: list[int]) -> None:
        """first_*: position of the oldest token that each row's window and compression still remember."""
        name = type(self).__name__
        if num_tokens < 0 or num_tokens > min(self.lengths, default=0):
            raise ValueError(f"{name}: cannot crop {num_tokens} tokens from rows of {self.lengths}")
        for length, near, raw in zip(self.lengths, first_window, first_raw, strict=True):
            left = length - num_tokens
            pending = self.config.num_compressed_blocks(left) * self.config.compress_stride
            if near > max(0, left - self.config.window_size + 1) or raw > pending:
                raise ValueError(
                    f"{name}: max_crop={self.max_crop} tokens can be taken back, expected no more, got {num_tokens}"
                )


def convert(source: LayerCache, target: LayerCache) -> LayerCache:
    """Put what `source` remembers into `target`, a cache of any layout, and return it. `source` stays as it is.

    Decoding goes on from `target` with the same numbers; tokens that `source` could take back, `target` can too, as
    far as its own max_crop allows.

    Raises:
        ValueError: different configurations, or no room in `target`, which is then what it was.
    """
    if source.config != target.config:
        raise ValueError(f"convert: expected caches of one configuration, got {source.config} and {target.config}")
    contents = source.contents()
    if contents is not None:
        target.fill(contents)
    return target


def row_indices(rows: Tensor, device: torch.device) -> tuple[Tensor, list[int]]:
    """What `reorder` was given: on the device without the -1, and on the host."""
    return rows.to(device).clamp(min=0), rows.tolist()
