"""The attention of the methods as layers of vLLM's Llama; weights keep the names that `save_pretrained` gives them."""

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
from vllm.model_executor.models import llama
from vllm.model_executor.models.utils import extract_layer_index

from nsa.methods.infllm_v2 import infllm_v2_attention
from nsa.models.families import window_of
from nsa.modules.compression import Compression
from nsa.ops.attend import attend as nsa_attend
from nsa.ops.rotary import rotated
from nsa.serving.append import append
from nsa.serving.attend import attend
from nsa.serving.blocks import LayerBlocks
from nsa.serving.decode import decode
from nsa.serving.gathered import append_and_attend
from nsa.serving.vllm_cache import CacheLayer, FixedTables, decode_step_of, step_of
from nsa.streams import Causal, Stream, Window

# Families whose keys and queries are normed; and whose q, k and v have a bias, though their configuration says none.
NORMED, BIASED = ("nsa_qwen3",), ("nsa_qwen2",)


class SparseAttention(nn.Module):
    """Projections over vLLM's blocks, heads spread over the ranks of tensor parallelism; a method says how it attends.

    branches: suffixes of the projections of keys and values.
    has_gates: whether there is a gate a query head and branch.
    """

    has_gates = False

    def __init__(
        self, config: Any, hidden_size: int, num_heads: int, num_kv_heads: int, *, prefix: str, **kwargs: Any
    ) -> None:
        super().__init__()
        self.prefix = prefix
        self.head_dim = dim = getattr(config, "head_dim", None) or hidden_size // num_heads
        ranks = get_tensor_model_parallel_world_size()
        self.num_heads, self.num_kv_heads = num_heads // ranks, num_kv_heads // ranks
        bias, quant = kwargs.get("bias", False), kwargs.get("quant_config")

        def column(name: str, out: int, bias: bool) -> ColumnParallelLinear:
            return ColumnParallelLinear(hidden_size, out, bias=bias, quant_config=quant, prefix=f"{prefix}.{name}")

        own = bias or config.model_type in BIASED
        self.q_proj = column("q_proj", num_heads * dim, own)
        self.pairs = [f"{x}_proj{kind}" for kind in self.branches(config) for x in "kv"]
        for name in self.pairs:
            self.add_module(name, column(name, num_kv_heads * dim, own))
        self.g_proj = column("g_proj", 3 * num_heads, True) if self.has_gates else None
        self.o_proj = RowParallelLinear(
            num_heads * dim, hidden_size, bias=bias, quant_config=quant, prefix=f"{prefix}.o_proj"
        )
        normed = config.model_type in NORMED
        self.q_norm, self.k_norm = (RMSNorm(dim, eps=config.rms_norm_eps) if normed else None for _ in "qk")
        self.rotary = LlamaRotaryEmbedding(config)
        self.attn = CacheLayer(f"{prefix}.attn", self.num_kv_heads, dim)
        self.attn.owner = weakref.ref(self)

    @staticmethod
    def branches(config: Any) -> tuple[str, ...]:
        return ("",)

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        q = _normed(self.q_norm, self.q_proj(hidden_states)[0].unflatten(-1, (self.num_heads, -1)))
        pairs = [getattr(self, name)(hidden_states)[0].unflatten(-1, (self.num_kv_heads, -1)) for name in self.pairs]
        pairs[::2] = [_normed(self.k_norm, k) for k in pairs[::2]]
        gates = q.new_zeros(len(q), 0, 3)
        if self.g_proj is not None:
            gates = self.g_proj(hidden_states)[0].sigmoid().unflatten(-1, (self.num_heads, 3))
        out = torch.empty_like(q)
        torch.ops.nsa.serving_attention(q, pairs, gates, positions, out, self.prefix)
        return self.o_proj(out.flatten(1))[0]

    def attend(self, q: Tensor, pairs: list[Tensor], gates: Tensor, positions: Tensor) -> Tensor:
        """Append the step's tokens to the caches and attend; zeros where vLLM only measures."""
        tables: Any = get_forward_context().attn_metadata
        if not isinstance(tables, dict) or self.attn.name not in tables:
            return torch.zeros_like(q)
        return self.over_blocks(tables, q, pairs, gates, positions)

    def over_blocks(
        self, tables: dict[str, Any], q: Tensor, pairs: list[Tensor], gates: Tensor, positions: Tensor
    ) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} does not say how it attends over block tables")

    def factors(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.rotary(like, positions[None])
        return cos[0], sin[0]


class NSAAttention(SparseAttention):
    """`nsa.NativeSparseAttention`."""

    has_gates = True

    def __init__(self, config: Any, *args: Any, prefix: str, **kwargs: Any) -> None:
        super().__init__(config, *args, prefix=prefix, **kwargs)
        self.config, g, dim = config.nsa_config, self.num_kv_heads, self.head_dim
        self.compress_k, self.compress_v = Compression(dim, self.config), Compression(dim, self.config)
        self.cmp = CacheLayer(f"{prefix}.cmp", g, dim, per_state=self.config.compress_stride)
        self.win = None if self.config.shared_kv else CacheLayer(f"{prefix}.win", g, dim, kept=self.config.window_size)
        self.raw = CacheLayer(f"{prefix}.raw", g, dim, kept=self.config.compress_block_size)

    @staticmethod
    def branches(config: Any) -> tuple[str, ...]:
        return ("",) if config.nsa_config.shared_kv else ("", "_win", "_cmp")

    def over_blocks(
        self, tables: dict[str, Any], q: Tensor, pairs: list[Tensor], gates: Tensor, positions: Tensor
    ) -> Tensor:
        k_win, v_win = (None, None) if self.win is None else self.win.pair
        memory = LayerBlocks(*self.attn.pair, *self.cmp.pair, k_win, v_win, *self.raw.pair)
        main, raw = tables[self.attn.name], tables[self.raw.name]
        win = None if self.win is None else tables[self.win.name]
        if isinstance(main, FixedTables):
            return self._decode(memory, main, win, raw, q, pairs, gates)
        step, shared = step_of(self.config, memory.size, main, win, raw)
        if not shared:
            shared["tokens"] = self.factors(q, positions)
            shared["blocks"] = self.factors(q, step.block_positions)
        cos, sin = shared["tokens"]
        k, v, *rest = pairs
        pair = rotated(k, cos, sin), v
        others = (rotated(rest[0], cos, sin), *rest[1:]) if rest else (*pair, k, v)
        append(memory, step, (*pair, *others), (self.compress_k, self.compress_v), *shared["blocks"])
        return attend(rotated(q, cos, sin), gates, memory, step)

    def _decode(
        self, memory: LayerBlocks, main: FixedTables, win: FixedTables | None, raw: FixedTables, q: Tensor,
        pairs: list[Tensor], gates: Tensor,
    ) -> Tensor:  # fmt: skip
        """A step that may be captured: what follows from lengths is computed on the device, once for all layers."""
        tables, step, before = decode_step_of(main, win, raw, self.config, self.rotary, q)
        phi = (self.compress_k.weights(), self.compress_v.weights())
        return decode(memory, tables, step, before, q, gates, pairs, phi, self.config)


class DenseAttention(SparseAttention):
    """Of the layers that stay dense beside sparse ones, some within a window; one cache."""

    def __init__(self, config: Any, *args: Any, prefix: str, **kwargs: Any) -> None:
        super().__init__(config, *args, prefix=prefix, **kwargs)
        window = window_of(config, extract_layer_index(prefix))
        self.reach = Causal() if window is None else Window(window)

    def over_blocks(
        self, tables: dict[str, Any], q: Tensor, pairs: list[Tensor], gates: Tensor, positions: Tensor
    ) -> Tensor:
        main, (k, v), (cos, sin) = tables[self.attn.name], pairs, self.factors(q, positions)
        return append_and_attend(
            rotated(q, cos, sin), rotated(k, cos, sin), v, self.attn.pair, main.table, main.starts, main.lengths,
            self.over_all,
        )  # fmt: skip

    def over_all(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of the last positions over whole sequences."""
        return nsa_attend(q, Stream(k, v), self.reach, scale=q.shape[-1] ** -0.5)[0]


class InfLLMv2Attention(DenseAttention):
    """`nsa.InfLLMv2Attention`; one cache."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.config = config.infllm_v2_config

    def over_all(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return infllm_v2_attention(q, k, v, self.config)


class WindowAttention(llama.LlamaAttention):
    """The window twin's: vLLM's attention over the last `window_size` tokens."""

    def __init__(self, config: Any, *args: Any, prefix: str, cache_config: Any = None, **kwargs: Any) -> None:
        super().__init__(config, *args, prefix=prefix, cache_config=cache_config, **kwargs)
        del get_current_vllm_config().compilation_config.static_forward_context[f"{prefix}.attn"]
        self.attn = Attention(
            self.num_heads, self.head_dim, self.scaling, num_kv_heads=self.num_kv_heads, cache_config=cache_config,
            per_layer_sliding_window=config.nsa_config.window_size, prefix=f"{prefix}.attn",
        )  # fmt: skip


ATTENTIONS = {
    "nsa": NSAAttention, "infllm_v2": InfLLMv2Attention, "dense": llama.LlamaAttention, "window": WindowAttention,
}  # fmt: skip


def attention_of(config: Any, layer: int) -> type[nn.Module]:
    """The class of a layer's attention. The dense twin's is vLLM's own."""
    return DenseAttention if layer in (config.dense_layers or ()) else ATTENTIONS[config.attention]


def _normed(norm: RMSNorm | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x.contiguous())


@torch.library.custom_op("nsa::serving_attention", mutates_args=("out",))
def serving_attention(
    q: Tensor, pairs: list[Tensor], gates: Tensor, positions: Tensor, out: Tensor, layer: str
) -> None:
    # By its name in the graph of a compiled model; a process may have several engines.
    attention = get_forward_context().no_compile_layers[f"{layer}.attn"].owner()
    out.copy_(attention.attend(q, pairs, gates, positions))


@serving_attention.register_fake
def _(q: Tensor, pairs: list[Tensor], gates: Tensor, positions: Tensor, out: Tensor, layer: str) -> None:
    return None
