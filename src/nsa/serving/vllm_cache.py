"""The four caches of a layer as vLLM knows them: what each is asked to hold, and where a step finds it.

| | holds | kept |
|---|---|---|
| attn | k, v of the selection branch | all |
| cmp | compressed k, v, one for d tokens, in the blocks of attn | all |
| win | k, v of the window (not with shared keys and values) | the last w tokens |
| raw | what compression reads | the last l tokens |

All of them have blocks of one size, and layouts in which a block's layers lie together: then cmp shares the blocks of
attn, and a block of win or raw is one of the pool's as any other.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
    max_decode_query_len,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout, KVCacheSpec, SlidingWindowSpec

from nsa.backend import why_not_triton
from nsa.config import NSAConfig
from nsa.decode_step import DecodeStep, Rotary
from nsa.decoding import MAX_QUERIES
from nsa.serving.blocks import NULL_BLOCK
from nsa.serving.decode import DecodeTables
from nsa.serving.step import Step
from nsa.serving.vllm_version import BLOCK_SIZE


@dataclass
class Tables:
    """Of one cache in one step: the rows' block tables; where new tokens begin; how many tokens the rows have."""

    table: Tensor
    starts: list[int]
    lengths: list[int]
    steps: dict[tuple[int, int], tuple[Step, dict[str, Any]]] = field(default_factory=dict)


@dataclass
class FixedTables:
    """Of one cache in a decoding step, in storage that stays where it is: block tables, -1 for the null block.

    Of attn also how many tokens rows have and get in t columns, the kernels' counters, and for how many layers.
    """

    t: int
    layers: int
    table: Tensor
    lengths: Tensor
    counts: Tensor
    arrivals: Tensor
    steps: list[Any] = field(default_factory=list)


class TablesBuilder(AttentionMetadataBuilder[Tables | FixedTables]):
    """Of a step whose rows all have the same few tokens: what a CUDA graph of it reads; of others: plans on the host.

    Such steps are captured whole where the decoding kernels serve the model; the others run with all but the attention
    in graphs.
    """

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.is_on_kernels = why_not_kernels(vllm_config, device) is None
        self.has_drafts = vllm_config.speculative_config is not None
        self.rows = vllm_config.scheduler_config.max_num_seqs
        self.fixed: FixedTables | None = None

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: Any) -> AttentionCGSupport:
        if why_not_kernels(vllm_config, current_platform.device_type) is not None:
            return AttentionCGSupport.NEVER
        if max_decode_query_len(vllm_config) > MAX_QUERIES:
            return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        return AttentionCGSupport.UNIFORM_BATCH

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Tables | FixedTables:
        common, rows, t = common_attn_metadata, common_attn_metadata.num_reqs, common_attn_metadata.max_query_len
        if self.is_on_kernels and 1 <= t <= MAX_QUERIES and common.num_actual_tokens == rows * t:
            return self._fixed(common, rows, t)
        # The bound is exact but for drafts that are not yet accepted or rejected.
        is_exact = common.seq_lens_cpu_upper_bound is not None and not self.has_drafts
        lengths = common.seq_lens_cpu_upper_bound if is_exact else common.seq_lens
        starts = common.query_start_loc_cpu[: rows + 1].tolist()
        return Tables(common.block_table_tensor[:rows], starts, lengths[:rows].tolist())

    def _fixed(self, common: CommonAttentionMetadata, rows: int, t: int) -> FixedTables:
        table = common.block_table_tensor[:rows]
        if self.fixed is None:
            self.fixed = self._room(max(self.rows, rows), table.shape[1])
        room = self.fixed
        found = replace(
            room, t=t, table=room.table[:rows], lengths=room.lengths[:rows], counts=room.counts[:rows],
            arrivals=room.arrivals[:rows], steps=[],
        )  # fmt: skip
        if self.kv_cache_spec.tokens_per_state > 1:
            return found  # compressed keys lie by the tables of the selection branch
        found.table.copy_(table.where(table > NULL_BLOCK, -1))
        if isinstance(self.kv_cache_spec, FullAttentionSpec):
            # Whoever has no block is padding, or measured before there are any.
            has_tokens = table[:, 0] > NULL_BLOCK
            counts = common.query_start_loc[1 : rows + 1] - common.query_start_loc[:rows]
            torch.mul(counts, has_tokens, out=found.counts)
            torch.mul(common.seq_lens[:rows], has_tokens, out=found.lengths)
        return found

    def _room(self, rows: int, width: int) -> FixedTables:
        def empty(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=self.device)

        arrivals = empty(rows, self.kv_cache_spec.num_kv_heads, 16)
        return FixedTables(1, len(self.layer_names), empty(rows, width), empty(rows), empty(rows), arrivals)


def why_not_kernels(vllm_config: VllmConfig, device: Any) -> str | None:
    """Why the decoding kernels do not serve the model on this device; None where they do."""
    model, config = vllm_config.model_config, vllm_config.model_config.hf_config
    if config.attention != "nsa" or config.dense_layers:
        return "its steps are planned on the host"
    heads = (f(vllm_config.parallel_config) for f in (model.get_num_attention_heads, model.get_num_kv_heads))
    q, k = (torch.empty(0, 1, n, model.get_head_size(), dtype=model.dtype, device=device) for n in heads)
    return why_not_triton(q, k, k)


class NSABackend(AttentionBackend):
    """Of a cache, not of a computation: the layer reads its caches itself."""

    supported_dtypes = (torch.float32, torch.bfloat16, torch.float16)

    @staticmethod
    def get_name() -> str:
        return "NSA"

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError("NSABackend has memory and tables; the layer attends by itself")

    @staticmethod
    def get_builder_cls() -> type[TablesBuilder]:
        return TablesBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [MultipleOf(1)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        return BLOCK_SIZE

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.BLNHC, KVCacheLayout.BLHNC)


class CacheLayer(nn.Module, AttentionLayerBase):
    """One cache of one layer: keys beside values, [blocks, heads, tokens, d + e].

    Args:
        name: by which vLLM knows it.
        heads, dim: g, and d = e.
        per_state: tokens that one entry stands for, d (stride) for compressed ones.
        kept: tokens that are kept before the next one and with it, or None for all.
    """

    def __init__(self, name: str, heads: int, dim: int, *, per_state: int = 1, kept: int | None = None) -> None:
        super().__init__()
        self.name, self.heads, self.dim, self.per_state, self.kept = name, heads, dim, per_state, kept
        self.num_heads, self.dtype = heads, torch.get_default_dtype()  # of the model, while it is made
        self.kv_cache = torch.tensor([])
        self.owner: Any = None  # the attention that reads it, weakly
        layers = get_current_vllm_config().compilation_config.static_forward_context
        if name in layers:
            raise ValueError(f"Duplicate layer name: {name}")
        layers[name] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        return NSABackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        given: dict[str, Any] = {
            "block_size": vllm_config.cache_config.block_size, "num_kv_heads": self.heads, "head_size": self.dim,
            "dtype": self.dtype,
        }  # fmt: skip
        if self.kept is None:
            return FullAttentionSpec(**given, tokens_per_state=self.per_state)
        return SlidingWindowSpec(**given, sliding_window=self.kept)

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """Keys and values [blocks, tokens, heads, dim], views."""
        both = self.kv_cache.transpose(1, 2)
        return both[..., : self.dim], both[..., self.dim :]


def step_of(config: NSAConfig, size: int, main: Tables, win: Tables | None, raw: Tables) -> tuple[Step, dict[str, Any]]:
    """The step of layers with these tables, made once; and a place for what else they share."""
    key = (id(win), id(raw))
    if key not in main.steps:
        table_win = None if win is None else win.table
        main.steps[key] = (Step(config, size, main.starts, main.lengths, main.table, table_win, raw.table), {})
    return main.steps[key]


def decode_step_of(
    main: FixedTables, win: FixedTables | None, raw: FixedTables, config: NSAConfig, rotary: Rotary, like: Tensor
) -> tuple[DecodeTables, DecodeStep, Tensor]:
    """Tables and step of layers with these, made by the first of each pass; and a layer's own lengths before it."""
    if not main.steps:
        table_win = None if win is None else win.table
        tables = DecodeTables(main.t, main.table, table_win, raw.table, main.lengths, main.counts, main.arrivals)
        step, before = tables.step(main.layers, config, rotary, like)
        main.steps += [(tables, step, own) for own in before]
    return main.steps.pop()
