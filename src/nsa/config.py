"""The sizes of Native Sparse Attention, each with the paper's symbol, and what follows from them."""

import json
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

Compression = Literal["mlp", "linear", "mean"]


SIZES = (
    "compress_block_size",
    "compress_stride",
    "select_block_size",
    "num_selected_blocks",
    "num_initial_blocks",
    "num_local_blocks",
    "window_size",
)


@dataclass(frozen=True, kw_only=True)
class NSAConfig:
    """Block sizes, strides and counts of NSA; the defaults are the paper's (arXiv:2502.11089, section 4.1).

    Constraints, each a ValueError: every size positive, d divides l, d divides l', l <= l',
    n >= initial + local blocks. That the query heads are a multiple of the KV heads is checked where heads are known.
    """

    compress_block_size: int = 32
    """l: tokens in one compression block."""
    compress_stride: int = 16
    """d: tokens between the starts of two compression blocks."""
    select_block_size: int = 64
    """l': tokens in one selection block."""
    num_selected_blocks: int = 16
    """n: blocks each query selects, the forced ones included."""
    num_initial_blocks: int = 1
    """Forced: the first blocks of the sequence."""
    num_local_blocks: int = 2
    """Forced: the query's own block and those just before it."""
    window_size: int = 512
    """w: keys in the sliding window, the query's own position included."""
    compression: Compression = "mlp"
    """phi, which makes one key or value of a block."""
    shared_kv: bool = False
    """One k, v for the three branches instead of one pair each."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and (isinstance(value, bool) or not isinstance(value, int)):
                raise ValueError(f"NSAConfig: {field.name} should be an int, got {value!r}")
        for name in ("compress_block_size", "compress_stride", "select_block_size"):
            self._require(getattr(self, name) >= 1, f"{name} >= 1", name)
        for name in ("num_selected_blocks", "num_initial_blocks", "num_local_blocks", "window_size"):
            self._require(getattr(self, name) >= 1, f"{name} >= 1", name)
        self._require(
            self.compress_block_size % self.compress_stride == 0,
            "compress_stride (d) divides compress_block_size (l)",
            "compress_stride",
            "compress_block_size",
        )
        self._require(
            self.select_block_size % self.compress_stride == 0,
            "compress_stride (d) divides select_block_size (l')",
            "compress_stride",
            "select_block_size",
        )
        self._require(
            self.compress_block_size <= self.select_block_size,
            "compress_block_size (l) <= select_block_size (l')",
            "compress_block_size",
            "select_block_size",
        )
        self._require(
            self.num_selected_blocks >= self.num_initial_blocks + self.num_local_blocks,
            "num_selected_blocks (n) >= num_initial_blocks + num_local_blocks",
            "num_selected_blocks",
            "num_initial_blocks",
            "num_local_blocks",
        )
        if self.compression not in ("mlp", "linear", "mean"):
            raise ValueError(f"NSAConfig: compression should be 'mlp', 'linear' or 'mean', got {self.compression!r}")
        if not isinstance(self.shared_kv, bool):
            raise ValueError(f"NSAConfig: shared_kv should be a bool, got {self.shared_kv!r}")

    def _require(self, holds: bool, rule: str, *names: str) -> None:
        if not holds:
            got = ", ".join(f"{name}={getattr(self, name)}" for name in names)
            raise ValueError(f"NSAConfig: expected {rule}, got {got}")

    # Counts

    @property
    def sizes(self) -> list[int]:
        """The seven numbers that the attention itself needs, as its operators take them."""
        return [getattr(self, name) for name in SIZES]

    @classmethod
    def from_sizes(cls, sizes: list[int]) -> "NSAConfig":
        named: dict[str, Any] = dict(zip(SIZES, sizes, strict=True))
        return cls(**named)

    def num_compressed_blocks(self, length: int) -> int:
        """Compression blocks that lie wholly inside the first `length` tokens: block i needs i*d + l <= length."""
        return max(0, (length - self.compress_block_size) // self.compress_stride + 1)

    def num_visible_compressed_blocks(self, position: int) -> int:
        """Compression blocks that the query at `position` sees: those with i*d + l - 1 <= position."""
        return self.num_compressed_blocks(position + 1)

    def num_selection_blocks(self, length: int) -> int:
        """Selection blocks that hold at least one of the first `length` tokens (the last one may be short)."""
        return -(-length // self.select_block_size)

    def keys_per_query(self, length: int) -> int:
        """Keys that the last of `length` positions reads, compressed ones counted as one (paper, table 4).

        s/d + n*l' + w, cut to what exists (dense reads s): 2048 at 8k tokens and 5632 at 64k with the defaults, less
        the one block of s/d that would end after s.
        """
        selected = min(length, self.num_selected_blocks * self.select_block_size)
        return self.num_compressed_blocks(length) + selected + min(length, self.window_size)

    # Files

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "NSAConfig":
        """The configuration with these fields; an unknown key is an error, a missing one takes its default."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"NSAConfig: unknown keys {unknown}; known keys are {known}")
        return cls(**values)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "NSAConfig":
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError(f"NSAConfig: expected a JSON object, got {type(values).__name__}")
        return cls.from_dict(values)
