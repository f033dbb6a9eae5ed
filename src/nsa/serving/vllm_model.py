"""The model for vLLM: its own Llama around NSA's attention. Weights keep the names that `save_pretrained` gives them.

The dense and the window twin are vLLM's Llama with its own attention.
"""

import weakref
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
from vllm.model_executor.models import llama
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper

from nsa.modules.compression import Compression
from nsa.ops.rotary import rotated
from nsa.serving.append import append
from nsa.serving.attend import attend
from nsa.serving.blocks import LayerBlocks
from nsa.serving.decode import decode
from nsa.serving.vllm_cache import CacheLayer, FixedTables, decode_step_of, step_of


class NSAAttention(nn.Module):
    """`nsa.NativeSparseAttention` over vLLM's blocks; heads are spread over the ranks of tensor parallelism."""

    def __init__(
        self, config: Any, hidden_size: int, num_heads: int, num_kv_heads: int, *, prefix: str, **kwargs: Any
    ) -> None:
        super().__init__()
        self.config, self.prefix, dim = config.nsa_config, prefix, config.head_dim
        ranks = get_tensor_model_parallel_world_size()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads // ranks, num_kv_heads // ranks, dim
        common = {"bias": kwargs.get("bias", False), "quant_config": kwargs.get("quant_config")}

        def column(name: str, out: int, **given: Any) -> ColumnParallelLinear:
            return ColumnParallelLinear(hidden_size, out, **{**common, **given}, prefix=f"{prefix}.{name}")

        self.q_proj = column("q_proj", num_heads * dim)
        own = ("", "_win", "_cmp")[: 1 if self.config.shared_kv else 3]
        self.pairs = [f"{x}_proj{kind}" for kind in own for x in "kv"]
        for name in self.pairs:
            self.add_module(name, column(name, num_kv_heads * dim))
        self.g_proj = column("g_proj", 3 * num_heads, bias=True)
        self.o_proj = RowParallelLinear(num_heads * dim, hidden_size, **common, prefix=f"{prefix}.o_proj")
        self.compress_k, self.compress_v = Compression(dim, self.config), Compression(dim, self.config)
        self.rotary = LlamaRotaryEmbedding(config)

        g = self.num_kv_heads
        self.attn = CacheLayer(f"{prefix}.attn", g, dim)
        self.cmp = CacheLayer(f"{prefix}.cmp", g, dim, per_state=self.config.compress_stride)
        self.win = None if self.config.shared_kv else CacheLayer(f"{prefix}.win", g, dim, kept=self.config.window_size)
        self.raw = CacheLayer(f"{prefix}.raw", g, dim, kept=self.config.compress_block_size)
        self.attn.owner = weakref.ref(self)

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        q = self.q_proj(hidden_states)[0].unflatten(-1, (self.num_heads, -1))
        pairs = [getattr(self, name)(hidden_states)[0].unflatten(-1, (self.num_kv_heads, -1)) for name in self.pairs]
        gates = self.g_proj(hidden_states)[0].sigmoid().unflatten(-1, (self.num_heads, 3))
        out = torch.empty_like(q)
        torch.ops.nsa.serving_attention(q, pairs, gates, positions, out, self.prefix)
        return self.o_proj(out.flatten(1))[0]

    def attend(self, q: Tensor, pairs: list[Tensor], gates: Tensor, positions: Tensor) -> Tensor:
        """Append the step's tokens to the caches and attend; zeros where vLLM only measures."""
        tables: Any = get_forward_context().attn_metadata
        if not isinstance(tables, dict) or self.attn.name not in tables:
            return torch.zeros_like(q)
        k_win, v_win = (None, None) if self.win is None else self.win.pair
        memory = LayerBlocks(*self.attn.pair, *self.cmp.pair, k_win, v_win, *self.raw.pair)
        win = None if self.win is None else tables[self.win.name]
        if isinstance(tables[self.attn.name], FixedTables):
            return self._decode(memory, tables[self.attn.name], win, tables[self.raw.name], q, pairs, gates)
        step, shared = step_of(self.config, memory.size, tables[self.attn.name], win, tables[self.raw.name])
        if not shared:
            shared["tokens"] = self._factors(q, positions)
            shared["blocks"] = self._factors(q, step.block_positions)
        cos, sin = shared["tokens"]
        k, v, *rest = pairs
        new_k_win, new_v_win, k_raw, v_raw = rest or (None, None, k, v)
        new_k_win = None if new_k_win is None else rotated(new_k_win, cos, sin)
        append(
            memory, step, rotated(k, cos, sin), v, new_k_win, new_v_win, k_raw, v_raw, self.compress_k,
            self.compress_v, *shared["blocks"],
        )  # fmt: skip
        return attend(rotated(q, cos, sin), gates, memory, step)

    def _decode(
        self, memory: LayerBlocks, main: FixedTables, win: FixedTables | None, raw: FixedTables, q: Tensor,
        pairs: list[Tensor], gates: Tensor,
    ) -> Tensor:  # fmt: skip
        """A step that may be captured: what follows from lengths is computed on the device, once for all layers."""
        tables, step, before = decode_step_of(main, win, raw, self.config, self.rotary, q)
        phi = (self.compress_k.weights(), self.compress_v.weights())
        return decode(memory, tables, step, before, q, gates, pairs, phi, self.config)

    def _factors(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.rotary(like, positions[None])
        return cos[0], sin[0]


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


class WindowAttention(llama.LlamaAttention):
    """The window twin's: vLLM's attention over the last `window_size` tokens."""

    def __init__(self, config: Any, *args: Any, prefix: str, cache_config: Any = None, **kwargs: Any) -> None:
        super().__init__(config, *args, prefix=prefix, cache_config=cache_config, **kwargs)
        del get_current_vllm_config().compilation_config.static_forward_context[f"{prefix}.attn"]
        self.attn = Attention(
            self.num_heads, self.head_dim, self.scaling, num_kv_heads=self.num_kv_heads, cache_config=cache_config,
            per_layer_sliding_window=config.nsa_config.window_size, prefix=f"{prefix}.attn",
        )  # fmt: skip


ATTENTIONS = {"nsa": NSAAttention, "dense": llama.LlamaAttention, "window": WindowAttention}


class NSADecoderLayer(llama.LlamaDecoderLayer):
    def __init__(self, vllm_config: VllmConfig, prefix: str = "", config: Any = None) -> None:
        config = config or vllm_config.model_config.hf_config
        super().__init__(vllm_config, prefix, config, attn_layer_type=ATTENTIONS[config.attention])


class NSALlamaForCausalLM(llama.LlamaForCausalLM):
    """For `ModelRegistry`; vLLM's decoder, head and logits."""

    packed_modules_mapping: ClassVar = {"gate_up_proj": ["gate_proj", "up_proj"]}

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        compilation = vllm_config.compilation_config
        if compilation.splitting_ops and "nsa::serving_attention" not in compilation.splitting_ops:
            compilation.splitting_ops.append("nsa::serving_attention")  # what reads the host is in no graph
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=NSADecoderLayer)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        if self.config.attention != "nsa":
            return super().load_weights(weights)
        # Not by way of the decoder's own loader, which puts q, k and v into one.
        loader = AutoWeightsLoader(_Parts(self))
        return loader.load_weights(weights, mapper=WEIGHTS)


class _Parts(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.lm_head = nn.Module(), model.lm_head
        for name, part in model.model.named_children():
            self.model.add_module(name, part)


WEIGHTS = WeightsMapper(
    orig_to_new_substr={"self_attn.gate_proj": "self_attn.g_proj"},  # what an earlier version wrote
    orig_to_new_stacked={".mlp.gate_proj": (".mlp.gate_up_proj", 0), ".mlp.up_proj": (".mlp.gate_up_proj", 1)},
)
