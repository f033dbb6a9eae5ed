"""Memory at fixed addresses (`CacheTensors`), and what the host knows of it.

The rows' lengths are on the device. A decoding step takes up to `max_new` tokens and needs nothing from the host but
`make_room`: `nsa.ops.decode` writes and reads the tensors, so that the step can be captured in a CUDA graph. A row may
sit a step out there, which the host does not see; from then on it keeps an upper bound, and asks the device for the
lengths when it must know them.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nsa.cache.layer import LayerCache
from nsa.cache_tensors import CacheTensors
from nsa.config import NSAConfig


@dataclass
class _Before:
    """What a transaction goes back to."""

    tensors: CacheTensors | None
    bounds: list[int]
    longest: list[int]
    lengths: Tensor | None  # the device's, where the host knows no more than bounds
    rings: tuple[Tensor, ...] | None = None  # copies, once more than max_new tokens have come

    def become_exact(self) -> None:
        if self.lengths is not None:
            self.bounds, self.lengths = self.lengths.tolist(), None


class FixedMemory(LayerCache):
    """The part of a static or paged cache that reads and writes no key: memory, lengths, room, and going back."""

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

    def is_step(self, t: int) -> bool:
        return self.is_allocated and t <= self.max_new and not torch.is_grad_enabled()

    @property
    def lengths(self) -> list[int]:
        if not self._exact:
            self.know_lengths(self.tensors.lengths.tolist())
        return list(self._bounds)

    def know_lengths(self, lengths: list[int]) -> None:
        """Tell the host the lengths, where they are known already (from another layer), so that it need not ask."""
        self._bounds, self._exact = list(lengths), True
        for before in self._open:
            before.become_exact()  # tokens are counted from there

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

    # ---- all or nothing -------------------------------------------------------------------------------------------

    def _before(self) -> Any:
        lengths = None if self._tensors is None or self._exact else self._tensors.lengths.clone()
        return _Before(self._tensors, self._bounds, self._longest, lengths)

    def _keep_rings(self, ends: list[int]) -> None:
        """Before rows take tokens up to `ends`: what open transactions go back to must not be overwritten.

        max_new tokens overwrite nothing that could be needed without them, and of empty rows there is nothing to keep.
        """
        copies: tuple[Tensor, ...] | None = None
        for before in self._open:
            many = any(end - bound > self.max_new for end, bound in zip(ends, before.bounds, strict=False))
            if before.rings is None and many and max(before.bounds) > 0:
                copies = copies or tuple(ring.clone() for ring in rings_of(self.tensors))
                before.rings = copies

    @torch.no_grad()
    def _go_back(self, before: _Before) -> None:
        if before.tensors is None:
            self._tensors, self._bounds, self._exact, self._longest = None, [], True, []
            self._gave_memory_up()
            return
        tensors, ends = before.tensors, self._bounds
        for ring, copy in zip(rings_of(tensors), before.rings or (), strict=False):
            ring.copy_(copy)
        tensors.arrivals.zero_()
        before.become_exact()
        write_lengths(tensors.lengths, before.bounds)
        self.know_lengths(before.bounds)
        self._longest = [
            max(longest, min(end, length + self.max_new))
            for longest, end, length in zip(before.longest, ends, before.bounds, strict=True)
        ]
        self._took_back()


def rings_of(tensors: CacheTensors) -> list[Tensor]:
    rings = (tensors.k_win, tensors.v_win, tensors.k_raw, tensors.v_raw)
    return [ring for ring in rings if ring is not None]


def write_lengths(lengths: Tensor, values: Sequence[int]) -> None:
    """Numbers of the host; where all rows have one, nothing waits for the device."""
    if values and len(set(values)) == 1:
        lengths.fill_(values[0])
    else:
        lengths.copy_(torch.tensor(values, dtype=torch.int32))
