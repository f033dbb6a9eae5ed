"""One legend of letters, one checker of shapes, and where the sequences of a batch lie.

    b batch   t queries   s keys   c compressed blocks   n selected blocks
    h query heads   g KV heads   d key dim   e value dim

Everywhere the queries are the **last t of s positions**: query column j is at position s - t + j. t == s is
training or prefill, t == 1 is decoding, anything between is a chunk of prefill; there is no other switch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor


def bind(op: str, **arguments: tuple[Tensor, str]) -> dict[str, int]:
    """Bind the letters of each argument's shape and return their sizes; a mismatch is one clear line.

    `bind("window_attention", q=(q, "b t h d"), k=(k, "b s g d"))`: a letter means the same size everywhere.
    """
    sizes: dict[str, int] = {}
    for name, (tensor, spec) in arguments.items():
        letters = spec.split()
        shape = tuple(tensor.shape)
        fits = len(shape) == len(letters) and all(
            size == sizes.get(letter, int(letter) if letter.isdigit() else size)
            for letter, size in zip(letters, shape, strict=True)
        )
        if not fits:
            expected = ", ".join(f"{x}={sizes[x]}" if x in sizes else x for x in letters)
            raise ValueError(f"{op}: {name} should have shape [{expected}], got {list(shape)}")
        sizes.update(zip(letters, shape, strict=True))
    if 0 in (sizes.get("h"), sizes.get("g")):
        raise ValueError(f"{op}: there should be a query head and a KV head, got {sizes.get('h')} and {sizes.get('g')}")
    if "h" in sizes and "g" in sizes and sizes["h"] % sizes["g"]:
        raise ValueError(
            f"{op}: the query heads should be a multiple of the KV heads, got {sizes['h']} and {sizes['g']}"
        )
    return sizes


def check_lengths(name: str, lengths: Tensor) -> None:
    """ValueError where they are not a 1-D tensor of int32 or int64."""
    if isinstance(lengths, Tensor) and lengths.dim() == 1 and lengths.dtype in (torch.int32, torch.int64):
        return
    got = f"{lengths.dtype} {list(lengths.shape)}" if isinstance(lengths, Tensor) else type(lengths).__name__
    raise ValueError(f"{name} should be a 1-D int32 or int64 tensor, got {got}")


def check_queries(
    op: str, sizes: tuple[int, int, int], cu_q: Tensor | None, cu_k: Tensor | None, seqlens_k: Tensor | None
) -> None:
    """ValueError where the shapes of lengths do not fit b rows of t queries and s keys; their values are not read."""
    b, t, s = sizes
    if cu_q is not None:
        if b != 1:
            raise ValueError(f"{op}: packed sequences should come with b = 1, got b = {b}")
        if cu_k is not None and len(cu_q) != len(cu_k):
            got = f"{len(cu_q) - 1} and {len(cu_k) - 1}"
            raise ValueError(f"{op}: cu_seqlens_q and cu_seqlens_k should name as many sequences, got {got}")
        if cu_k is None and t != s:
            raise ValueError(f"{op}: cu_seqlens_k should be given where t and s differ, got t = {t}, s = {s}")
    elif seqlens_k is not None and seqlens_k.shape[0] != b:
        raise ValueError(f"{op}: seqlens_k should have shape [b={b}], got {list(seqlens_k.shape)}")
    elif seqlens_k is None and t > s:
        raise ValueError(f"{op}: q holds the last t of the s positions of k: expected t <= s, got t = {t}, s = {s}")


@dataclass(frozen=True)
class Part:
    """Equal-length sequences that lie side by side: rows of the batch, and their run of queries and of keys."""

    rows: slice
    q_start: int
    num_queries: int  # t
    k_start: int
    num_keys: int  # s
    c_start: int  # where the part's entries of a pooled dimension begin

    @property
    def first_position(self) -> int:
        """Position of the part's first query; negative when leading queries are padding."""
        return self.num_keys - self.num_queries


def sequence_of(bounds: Tensor, tokens: Tensor) -> Tensor:
    """Of each packed token the sequence that holds it, past the end the last one; `bounds` are cu_seqlens."""
    at = torch.searchsorted(bounds, tokens.to(bounds.dtype), right=True) - 1
    return at.clamp(0, max(len(bounds) - 2, 0))


def packed_positions(bounds: Tensor, tokens: Tensor) -> Tensor:
    """Of each packed token its position in its sequence."""
    return tokens - bounds[sequence_of(bounds, tokens)]


@dataclass(frozen=True)
class Sequences:
    """Where each sequence's queries and keys lie, for three layouts.

    * uniform (no argument): every row of the batch is one sequence; t <= s.
    * packed (`cu_seqlens_q`, and `cu_seqlens_k` where the keys differ; b == 1): sequences one after another along
      dimension 1, as in FlashAttention's varlen API: int32/int64 [num_sequences + 1], from 0 to the total.
      Compressed blocks are packed in the same order.
    * ragged rows (`seqlens_k`, int [b]): row r has seqlens_k[r] keys, left-aligned; its queries are right-aligned,
      so that column j is at position seqlens_k[r] - t + j. A negative position is padding: the row's output is 0,
      its log-sum-exp -inf, its gradient 0. This is a left-padded batch, or a decoding step over a cache.

    Raises ValueError where lengths do not fit the tensors (checked when `parts` meets them).
    """

    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    seqlens_k: Tensor | None = None

    def __post_init__(self) -> None:
        if self.cu_seqlens_q is None and self.cu_seqlens_k is not None:
            raise ValueError("cu_seqlens_k was given without cu_seqlens_q")
        if self.cu_seqlens_q is not None and self.seqlens_k is not None:
            raise ValueError("give either cu_seqlens_q (packed) or seqlens_k (ragged rows), not both")
        for name in ("cu_seqlens_q", "cu_seqlens_k", "seqlens_k"):
            lengths = getattr(self, name)
            if lengths is not None:
                check_lengths(name, lengths)

    @property
    def is_uniform(self) -> bool:
        return self.cu_seqlens_q is None and self.seqlens_k is None

    @property
    def is_packed(self) -> bool:
        return self.cu_seqlens_q is not None

    @cached_property
    def _bounds(self) -> tuple[list[int], list[int]]:
        assert self.cu_seqlens_q is not None
        cu_q = self.cu_seqlens_q.tolist()
        cu_k = cu_q if self.cu_seqlens_k is None else self.cu_seqlens_k.tolist()
        for name, cu in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
            if not cu or cu[0] != 0 or any(low > high for low, high in pairwise(cu)):
                raise ValueError(f"{name} should rise from 0, got {cu}")
        if len(cu_q) != len(cu_k):
            raise ValueError(
                f"cu_seqlens_q and cu_seqlens_k should name as many sequences, got {len(cu_q) - 1} and {len(cu_k) - 1}"
            )
        return cu_q, cu_k

    @cached_property
    def _row_lengths(self) -> list[int]:
        assert self.seqlens_k is not None
        return self.seqlens_k.tolist()

    def num_entries(self, of_length: Callable[[int], int], num_keys: int) -> int:
        """Size of a pooled dimension that belongs to a key dimension of `num_keys`; `of_length`: that of a sequence."""
        if not self.is_packed:
            return of_length(num_keys)
        _, cu_k = self._bounds
        return sum(of_length(end - start) for start, end in pairwise(cu_k))

    def parts(self, of_length: Callable[[int], int] | None, b: int, t: int, s: int | None) -> Iterator[Part]:
        """The sequences of tensors with b rows, t queries and s keys (None: whatever the lengths say).

        of_length: entries that a sequence of so many keys has in a pooled dimension, where `c_start` is asked for.
        """
        if self.is_packed:
            cu_q, cu_k = self._bounds
            if b != 1:
                raise ValueError(f"packed sequences should come with b = 1, got b = {b}")
            if cu_q[-1] != t or (s is not None and cu_k[-1] != s):
                raise ValueError(f"cu_seqlens should end at t = {t} and s = {s}, got {cu_q[-1]} and {cu_k[-1]}")
            c_start = 0
            for q0, q1, k0, k1 in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False):
                if q1 - q0 > k1 - k0:
                    raise ValueError(f"a packed sequence should have t <= s, got t = {q1 - q0}, s = {k1 - k0}")
                yield Part(slice(0, 1), q0, q1 - q0, k0, k1 - k0, c_start)
                c_start += of_length(k1 - k0) if of_length else 0
        elif self.seqlens_k is not None:
            lengths = self._row_lengths
            if len(lengths) != b:
                raise ValueError(f"seqlens_k should have shape [b={b}], got [{len(lengths)}]")
            if any(length < 0 or (s is not None and length > s) for length in lengths):
                bound = "the number of keys" if s is None else f"s = {s}"
                raise ValueError(f"seqlens_k should lie between 0 and {bound}, got {lengths}")
            for row, length in enumerate(lengths):
                yield Part(slice(row, row + 1), 0, t, 0, length, 0)
        else:
            assert s is not None
            if t > s:
                raise ValueError(f"the queries are the last t of s positions: expected t <= s, got t = {t}, s = {s}")
            if b > 0:
                yield Part(slice(0, b), 0, t, 0, s, 0)


UNIFORM = Sequences()
