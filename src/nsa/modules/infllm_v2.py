"""The InfLLM-V2 layer: a dense layer's projections and no others, with or without a cache."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nsa.cache import LayerCache
from nsa.config import InfLLMv2Config
from nsa.distributed.attention import context_parallel_infllm_v2
from nsa.distributed.layout import ContextLayout
from nsa.methods.infllm_v2 import infllm_v2_attention
from nsa.modules.layer import SparseLayer
from nsa.modules.projections import project
from nsa.modules.rotary import Rotary, RotaryFactors, rotate
from nsa.modules.token_layout import TokenLayout
from nsa.ops.compress import blocks_of, compress, phi_mean
from nsa.ops.pooled_selection import pooled_scores, select_by_pooled_keys
from nsa.streams import Branches


class InfLLMv2Attention(SparseLayer):
    """InfLLM-V2 with its projections q, k, v and the output's: the parameters of dense attention, under Llama's names.

    Args:
        hidden_size: width of x.
        num_heads, num_kv_heads: H and HK; H a multiple of HK.
        head_dim: of queries and keys, even; hidden_size / num_heads by default.
        v_head_dim: of values, by default head_dim.
        config: block sizes and counts.
        rope_theta: base of the rotary frequencies.
        rotary: replaces the rotary embedding; called with (x, positions), returns cos and sin [b, t, head_dim].
        bias: whether the projections have one.

    Attributes:
        context: where it is set, x and the other arguments are one rank's part of sequences that several ranks hold
            (`nsa.distributed`).

    Raises:
        ValueError: head counts or dims that do not fit.
    """

    NAME, SIZES = "InfLLMv2Attention", InfLLMv2Config
    config: InfLLMv2Config

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int | None = None,
        v_head_dim: int | None = None,
        config: InfLLMv2Config | None = None,
        *,
        rope_theta: float = 10000.0,
        rotary: Rotary | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__(hidden_size, num_heads, num_kv_heads, head_dim, v_head_dim, config, rotary, rope_theta)
        head_dim, v_head_dim = self.head_dim, self.v_head_dim
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * v_head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * v_head_dim, hidden_size, bias=bias)

    def attend(self, x: Float[Tensor, "b t hidden"], layout: TokenLayout) -> Float[Tensor, "b t h e"]:
        q, k, v = self._inputs(x, layout.cos, layout.sin)
        if layout.counts is not None:
            k, v = layout.to_the_left(k), layout.to_the_left(v)
        return infllm_v2_attention(q, k, v, self.config, cu_seqlens_q=layout.cu_seqlens, seqlens_k=layout.counts)

    def attend_after(
        self, x: Tensor, layout: TokenLayout, cache: LayerCache, counts: list[int] | None, factors: RotaryFactors
    ) -> Float[Tensor, "b t h e"]:
        """The cache is any of `nsa.cache`, made with `config.blocks`; its pooled keys are means of rotated keys."""
        q, k, v = self._inputs(x, layout.cos, layout.sin)
        pooled, raw, _ = cache.update(Branches.of_tokens(k, v, k, v, k, v), self._pool_run, counts=counts)
        seqlens_k = raw.where.seqlens_k
        return infllm_v2_attention(q, raw.k, raw.v, self.config, k_pool=pooled.k, seqlens_k=seqlens_k)

    def attend_in_context(self, x: Tensor, layout: ContextLayout) -> Float[Tensor, "b t h e"]:
        return context_parallel_infllm_v2(*self._inputs(x, layout.cos, layout.sin), layout, self.config)

    def _pool_run(self, k: Tensor, v: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """The pooled keys of a run of tokens. A cache keeps a value beside each; nobody reads it."""
        pooled = phi_mean(blocks_of(k.detach(), self.blocks))
        return pooled, v.detach()[:, : pooled.shape[1]]

    def input_projections(self) -> list[nn.Module]:
        return [self.q_proj, self.k_proj, self.v_proj]

    @torch.no_grad()
    def select(self, x: Float[Tensor, "b t hidden"]) -> tuple[Float[Tensor, "b t g blocks"], Int[Tensor, "b t g n"]]:
        """What this layer would read of whole sequences x: the block scores and the lists of blocks."""
        layout = TokenLayout.of(x, self.rotary, self.blocks)
        q, k, _ = self._inputs(x, layout.cos, layout.sin)
        k_pool, s = compress(k, phi_mean, self.blocks), x.shape[1]
        lists = select_by_pooled_keys(q, k_pool, self.config, num_keys=s)
        return pooled_scores(q, k_pool, self.config, num_keys=s), lists

    def _inputs(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q and k rotated, and v."""
        q, k, v = self._heads(project(x, self.input_projections()))
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def _heads(self, projected: Sequence[Tensor]) -> list[Tensor]:
        """Queries, keys and values [b, t, heads, d] of what `input_projections` give."""
        widths = (self.head_dim, self.head_dim, self.v_head_dim)
        return [part.unflatten(-1, (-1, width)) for part, width in zip(projected, widths, strict=True)]
