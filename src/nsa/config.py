"""The sizes of Native Sparse Attention and of InfLLM-V2, each with the paper's symbol, and what follows from them."""

import json
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal, TypeVar

Compression = Literal["mlp", "linear", "mean"]
GATE_BIAS = 6.0  # of a dense layer made sparse: the selected branch's gate is sigmoid(6), the others' sigmoid(-6)
SomeSizes = TypeVar("SomeSizes", bound="_Sizes")


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
class _Sizes:
    """What the configurations share: checks of their fields, and files."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and (isinstance(value, bool) or not isinstance(value, int)):
                raise ValueError(f"{type(self).__name__}: {field.name} should be an int, got {value!r}")
            if field.type is bool and not isinstance(value, bool):
                raise ValueError(f"{type(self).__name__}: {field.name} should be a bool, got {value!r}")

    def _require(self, holds: bool, rule: str, *names: str) -> None:
        if not holds:
            got = ", ".join(f"{name}={getattr(self, name)}" for name in names)
            raise ValueError(f"{type(self).__name__}: expected {rule}, got {got}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls: type[SomeSizes], values: dict[str, Any]) -> SomeSizes:
        """The configuration with these fields; an unknown key is an error, a missing one takes its default."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"{cls.__name__}: unknown keys {unknown}; known keys are {known}")
        return cls(**values)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls: type[SomeSizes], text: str) -> SomeSizes:
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError(f"{cls.__name__}: expected a JSON object, got {type(values).__name__}")
        return cls.from_dict(values)


@dataclass(frozen=True, kw_only=True)
class NSAConfig(_Sizes):
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
        super().__post_init__()
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

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "NSAConfig":
        """As of every configuration; `second_order`, an option that is gone, may still be there and false."""
        if values.get("second_order", False) is not False:
            raise ValueError(
                "NSAConfig: the option second_order is gone, for training with it diverged: expected false, "
                f"got {values['second_order']!r}"
            )
        return super().from_dict({name: value for name, value in values.items() if name != "second_order"})

    # Counts

    @property
    def sizes(self) -> list[int]:
        """The seven numbers that the attention itself needs, as its operators take them."""
        return [getattr(self, name) for name in SIZES]

    @classmethod
    def from_sizes(cls, sizes: list[int]) -> "NSAConfig":
        named: dict[str, Any] = dict(zip(SIZES, sizes, strict=True))
        return cls(**named)

    def with_all_blocks(self, length: int) -> "NSAConfig":
        """The same where a query of `length` tokens selects all that there are."""
        most = max(self.num_selected_blocks, self.num_selection_blocks(length))
        return replace(self, num_selected_blocks=most)

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


INFLLM_V2_SIZES = (
    "kernel_size",
    "kernel_stride",
    "init_blocks",
    "block_size",
    "window_size",
    "topk",
    "dense_len",
    "coarse_lse",
)


@dataclass(frozen=True, kw_only=True)
class InfLLMv2Config(_Sizes):
    """Sizes of InfLLM-V2 (arXiv:2509.24663); names and defaults are those of MiniCPM4's `sparse_config`.

    A query selects `topk + ceil(window_size / block_size)` blocks: the first `init_blocks`, the
    `ceil(window_size / block_size) + 1` that end with its own and so cover its window, and the best others. With the
    defaults that is 96 = 1 + 33 + 62 blocks, 6144 keys.

    Constraints, each a ValueError: kernel_stride divides kernel_size and block_size, kernel_size <= block_size,
    topk >= init_blocks + 1; sizes and counts at least 1, dense_len at least 0.
    """

    kernel_size: int = 32
    """Tokens whose keys' mean is one pooled key."""
    kernel_stride: int = 16
    """Tokens between the starts of two pooled keys."""
    init_blocks: int = 1
    """Forced: the first blocks of the sequence."""
    block_size: int = 64
    """Tokens of a block, which is selected or not as a whole."""
    window_size: int = 2048
    """Keys that every query reads up to its own, in whole blocks."""
    topk: int = 64
    """Blocks besides those that the window fills; the first ones and the window's one block of overhang count."""
    dense_len: int = 8192
    """A query among the first `dense_len` tokens reads all keys up to its own; 0: none does for that reason."""
    coarse_lse: bool = False
    """Whether a pooled key's weight is relative to keys pooled four times as coarsely (the paper's approximation)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("kernel_size", "kernel_stride", "init_blocks", "block_size", "window_size", "topk"):
            self._require(getattr(self, name) >= 1, f"{name} >= 1", name)
        self._require(self.dense_len >= 0, "dense_len >= 0", "dense_len")
        for name in ("kernel_size", "block_size"):
            divides = getattr(self, name) % self.kernel_stride == 0
            self._require(divides, f"kernel_stride divides {name}", "kernel_stride", name)
        fits = self.kernel_size <= self.block_size
        self._require(fits, "kernel_size <= block_size", "kernel_size", "block_size")
        self._require(self.topk > self.init_blocks, "topk >= init_blocks + 1", "topk", "init_blocks")

    @classmethod
    def from_sparse_config(cls, values: dict[str, Any]) -> "InfLLMv2Config":
        """Of MiniCPM4's `sparse_config`; use_nope=True (choosing by keys without positions) is refused."""
        if values.get("use_nope"):
            raise ValueError("InfLLMv2Config: expected use_nope=False: pooled keys carry their positions; got True")
        return cls.from_dict({name: value for name, value in values.items() if name != "use_nope"})

    @cached_property
    def blocks(self) -> NSAConfig:
        """The same blocks in NSA's names: pooled keys are its compressed keys, selected blocks its selected blocks."""
        window = -(-self.window_size // self.block_size)
        return NSAConfig(
            compress_block_size=self.kernel_size,
            compress_stride=self.kernel_stride,
            select_block_size=self.block_size,
            num_selected_blocks=self.topk + window,
            num_initial_blocks=self.init_blocks,
            num_local_blocks=window + 1,
            window_size=1,  # there is no branch of its own for it
            compression="mean",
            shared_kv=True,
        )

    @property
    def sizes(self) -> list[int]:
        """The fields as integers, as operators take them."""
        return [int(getattr(self, name)) for name in INFLLM_V2_SIZES]

    @classmethod
    def from_sizes(cls, sizes: list[int]) -> "InfLLMv2Config":
        named: dict[str, Any] = dict(zip(INFLLM_V2_SIZES, sizes, strict=True))
        return cls(**named | {"coarse_lse": bool(named["coarse_lse"])})

    def with_all_blocks(self, length: int) -> "InfLLMv2Config":
        """The same where a query of `length` tokens reads all that there are."""
        return replace(self, dense_len=max(self.dense_len, length))

    @property
    def sees_all(self) -> int:
        """The largest length at which the last query still reads every key."""
        return max(self.dense_len, self.blocks.num_selected_blocks * self.block_size)

    def list_width(self, length: int) -> int:
        """Slots of a query's list of blocks, where no sequence has more than `length` keys."""
        return max(self.blocks.num_selected_blocks, -(-min(self.dense_len, length) // self.block_size))

    def keys_per_query(self, length: int) -> int:
        """Keys that the last of `length` positions reads, pooled ones counted as one; `length` where it reads all."""
        if length <= self.sees_all:
            return length
        return self.blocks.num_compressed_blocks(length) + self.blocks.num_selected_blocks * self.block_size
