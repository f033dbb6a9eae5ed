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

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder, CommonAttentionMetadata, MultipleOf
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout, KVCacheSpec, SlidingWindowSpec

from nsa.config import NSAConfig
from nsa.serving.step import Step
from nsa.serving.vllm_version import BLOCK_SIZE


@dataclass
class Tables:
    """Of one cache in one step: the rows' block tables; where new tokens begin; how many tokens the rows have."""

    table: Tensor
    starts: list[int]
    lengths: list[int]
    steps: dict[tuple[int, int], tuple[Step, dict[str, Any]]] = field(default_factory=dict)


class TablesBuilder(AttentionMetadataBuilder[Tables]):
    """No CUDA graphs: a step is planned from lengths on the host."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Tables:
        common = common_attn_metadata
        # The bound is exact but for drafts that are not yet accepted or rejected.
        lengths = common.seq_lens if common.seq_lens_cpu_upper_bound is None else common.seq_lens_cpu_upper_bound
        starts = common.query_start_loc_cpu[: common.num_reqs + 1].tolist()
        return Tables(common.block_table_tensor[: common.num_reqs], starts, lengths[: common.num_reqs].tolist())


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
