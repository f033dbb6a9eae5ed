"""The interface of a layer's caches: append tokens, get what their queries may read; take back, reorder, count."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nsa.cache_tensors import as_computed
from nsa.config import NSAConfig
from nsa.shapes import bind
from nsa.streams import Branches

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

    @classmethod
    def of(cls, branches: Branches) -> "CacheViews":
        cmp, slc, win = branches
        return cls(slc.k, slc.v, cmp.k, cmp.v, win.k, win.v, slc.where.seqlens_k, win.where.seqlens_k)


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
        self._open: list[Any] = []  # what `transaction` goes back to, the innermost last

    @property
    @abstractmethod
    def lengths(self) -> list[int]:
        """Tokens seen by each row; empty before the first append."""

    @abstractmethod
    def update(self, new: Branches, compress_run: CompressRun, *, counts: list[int] | None = None) -> Branches:
        """Remember new tokens and return the keys and values that their queries may read, rows left-aligned.

        The views are good until the next call. One token or four thousand are the same call. Under `torch.autocast`
        keys and values are kept in its dtype, to which attention casts them there anyway; a cache holds one dtype, that
        of its first tokens.

        Args:
            new: [b, t, g, .], the tokens' rotated keys, and values, for selection and window; for the compressed branch
                their own keys before rotation, and values (`Branches.of_tokens`).
            compress_run: compresses a run of raw tokens that begins at block `first`, keys rotated.
            counts: how many of the t columns are tokens in each row, its last ones; by default all.

        Raises:
            ValueError: shapes, dtypes or counts that do not fit each other or the tokens before, or no room. After this
                or any other exception, also one of compress_run, the cache is what it was.
        """

    def append(
        self, k: Tensor, v: Tensor, k_win: Tensor, v_win: Tensor, k_raw: Tensor, v_raw: Tensor,
        compress_run: CompressRun, *, counts: list[int] | None = None,
    ) -> CacheViews:  # fmt: skip
        """`update`, as it was called before there were branches; it goes with the release after this one."""
        warnings.warn(f"{type(self).__name__}.append: call update(Branches, ..)", DeprecationWarning, stacklevel=2)
        new = Branches.of_tokens(k_raw, v_raw, k, v, k_win, v_win)
        return CacheViews.of(self.update(new, compress_run, counts=counts))

    @abstractmethod
    def crop(self, num_tokens: int) -> None:
        """Take back the last `num_tokens` tokens of every row, as if they had never come.

        Raises:
            ValueError: more than a row has, or more than is still remembered (at least max_crop). Nothing changes.
        """

    @abstractmethod
    def reorder(self, rows: Tensor) -> None:
        """Row i becomes what row rows[i] was (beam search), -1 an empty one; rows may repeat, or be fewer or more.

        Raises:
            ValueError: not a 1-D tensor of at least one integer, or a row that there is not. Nothing changes.
        """

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

    def is_step(self, t: int) -> bool:
        """Whether t new tokens now are a decoding step, all of it on the device, rather than a prefill.

        In memory at fixed addresses, for at most `max_new` tokens and without gradients; never in a growing cache.
        """
        return False

    @property
    def num_rows(self) -> int:
        """Rows of the tokens so far; 0 before the first ones. Nothing waits for the device."""
        return len(self.lengths)

    def check_rows(self, b: int) -> None:
        """ValueError where the next tokens are of another number of rows than before."""
        if self.num_rows and self.num_rows != b:
            raise ValueError(f"{type(self).__name__}: expected {self.num_rows} rows as before, got {b}")

    def check_config(self, config: NSAConfig) -> None:
        """ValueError where a layer of this configuration cannot use the cache: it was made for another one."""
        if config is self.config or config == self.config:
            return
        names = [x.name for x in fields(config) if getattr(config, x.name) != getattr(self.config, x.name)]
        mine, its = (", ".join(f"{name}={getattr(x, name)}" for name in names) for x in (self.config, config))
        raise ValueError(f"{type(self).__name__}: it was made for {mine}, but the layer has {its}")

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """The tokens that come inside the block come all or not at all: if it raises, the cache is what it was."""
        self._open.append(self._before())
        try:
            yield
        except BaseException:
            self._go_back(self._open[-1])
            raise
        finally:
            self._open.pop()

    @abstractmethod
    def _before(self) -> Any:
        """What `_go_back` needs, taken without copying what tokens that come do not overwrite."""

    @abstractmethod
    def _go_back(self, before: Any) -> None:
        """Forget the tokens that have come since `before`."""

    def _as_kept(self, new: Branches, counts: list[int] | None, kept: tuple[Tensor, ...]) -> tuple[Branches, list[int]]:
        """The arguments of `update`, checked against each other and the memory `kept` (k, v; none yet), and cast."""
        name = type(self).__name__
        k_raw, v_raw, k, v, k_win, v_win = new.tensors
        given = {"k": k, "v": v, "k_win": k_win, "v_win": v_win, "k_raw": k_raw, "v_raw": v_raw}
        shapes = {key: (x, "b t g d" if key[0] == "k" else "b t g e") for key, x in given.items()}
        b, t, *_ = bind(f"{name}.update", **shapes).values()
        if not b:
            raise ValueError(f"{name}: expected at least one row, got none")
        self.check_rows(b)
        for key, x, before in zip("kv", (k, v), kept, strict=False):
            if x.shape[2:] != before.shape[2:]:
                heads, size = before.shape[2:]
                raise ValueError(
                    f"{name}.update: {key} should have shape [b={b}, t={t}, g={heads}, {size}] as before, "
                    f"got {list(x.shape)}"
                )
        cast = as_computed(*new.tensors)
        memory = [kept[0] if kept else cast[0]]
        for what, ours, came in (
            ("dtype", memory[0].dtype, {x.dtype for x in cast}),
            ("device", memory[0].device, {x.device for x in cast}),
        ):
            if came != {ours}:
                got = ", ".join(sorted(map(str, came)))
                hint = " (each call over one cache under autocast, or none)" if what == "dtype" and kept else ""
                raise ValueError(f"{name}: expected keys and values of {what} {ours}, got {got}{hint}")
        if counts is None:
            return Branches.of_tokens(*cast), [t] * b
        if len(counts) != b or not all(0 <= count <= t for count in counts):
            raise ValueError(f"{name}: counts should be b={b} numbers between 0 and t={t}, got {counts}")
        return Branches.of_tokens(*cast), counts

    def _rows_from(self, rows: Tensor, device: torch.device) -> tuple[Tensor, list[int]]:
        """What `reorder` was given: on the device without the -1, and on the host."""
        name, have = type(self).__name__, self.num_rows
        if rows.dim() != 1 or not len(rows) or rows.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"{name}.reorder: expected a 1-D tensor of at least one int32 or int64, "
                f"got {rows.dtype} {list(rows.shape)}"
            )
        chosen = rows.tolist()
        if not all(-1 <= row < have for row in chosen):
            raise ValueError(f"{name}.reorder: expected rows between -1 and {have - 1}, got {chosen}")
        return rows.to(device).clamp(min=0), chosen

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
