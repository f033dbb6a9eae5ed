"""The InfLLM-V2 layer: a dense layer's projections and no others, with or without a cache."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nsa.cache import LayerCache
from nsa.config import InfLLMv2Config
from nsa.distributed import ContextParallel
from nsa.distributed.attention import context_parallel_infllm_v2
from nsa.distributed.layout import ContextLayout
from nsa.methods.infllm_v2 import infllm_v2_attention
from nsa.modules.attention import column_positions
from nsa.modules.projections import project
from nsa.modules.rotary import Rotary, RotaryEmbedding, RotaryFactors, rotate
from nsa.modules.token_layout import TokenLayout, padding
from nsa.ops.compress import blocks_of, compress, phi_mean
from nsa.ops.pooled_selection import pooled_scores, select_by_pooled_keys
from nsa.streams import Branches

NAME = "InfLLMv2Attention"


class InfLLMv2Attention(nn.Module):
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

    context: ContextParallel | None = None

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
        super().__init__()
        if num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads:
            got = f"{num_heads} and {num_kv_heads}"
            raise ValueError(f"{NAME}: num_heads should be a multiple of num_kv_heads, got {got}")
        if head_dim is None and hidden_size % num_heads:
            got = f"{hidden_size} and {num_heads}"
            raise ValueError(f"{NAME}: give head_dim, or a hidden_size divisible by num_heads; got {got}")
        if config is not None and not isinstance(config, InfLLMv2Config):
            got = type(config).__name__
            raise ValueError(f"{NAME}: config should be an InfLLMv2Config (InfLLMv2Config.from_dict), got {got}")
        self.config = config or InfLLMv2Config()
        self.blocks = self.config.blocks  # which torch.compile could not ask for
        self.hidden_size, self.num_heads, self.num_kv_heads = hidden_size, num_heads, num_kv_heads
        self.head_dim = head_dim = head_dim or hidden_size // num_heads
        self.v_head_dim = v_head_dim = v_head_dim or head_dim
        self.rotary = rotary or RotaryEmbedding(head_dim, rope_theta)
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * v_head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * v_head_dim, hidden_size, bias=bias)

    def forward(
        self,
        x: Float[Tensor, "b t hidden"],
        *,
        cache: LayerCache | None = None,
        attention_mask: Tensor | None = None,
        cu_seqlens: Int[Tensor, " sequences_plus_1"] | None = None,
        max_seqlen: int | None = None,
        position_ids: Int[Tensor, "_ t"] | None = None,
        layout: TokenLayout | ContextLayout | None = None,
        factors: RotaryFactors | None = None,
    ) -> Float[Tensor, "b t hidden"]:
        """Attention output of new tokens, after those that the cache remembers.

        Args, Returns, Raises: as for `nsa.NativeSparseAttention.forward`. The cache is any of `nsa.cache`, made with
        `config.blocks`; its pooled keys are the means of rotated keys. The cache reads lengths on the host.
        """
        expected = f"[b, t, hidden={self.hidden_size}]"
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() != 3 or x.shape[2] != self.hidden_size:
            got = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{NAME}: x should be a tensor {expected} of floating point, got {got}")
        if self.context is not None:
            if cache is not None or attention_mask is not None:
                given = "cache" if cache is not None else "attention_mask"
                raise ValueError(f"{NAME}: {given} does not go with context parallelism; expected None")
            if layout is None:
                layout = ContextLayout.of(
                    x, self.rotary, self.blocks, self.context,
                    cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, position_ids=position_ids,
                )  # fmt: skip
            assert isinstance(layout, ContextLayout)
            q, k, v = self._inputs(x, layout.cos, layout.sin)
            return self.o_proj(context_parallel_infllm_v2(q, k, v, layout, self.config).flatten(2))
        assert not isinstance(layout, ContextLayout)
        if cache is not None:
            if cu_seqlens is not None or position_ids is not None:
                given = "cu_seqlens" if cu_seqlens is not None else "position_ids"
                raise ValueError(f"{NAME}: {given} does not go with a cache, whose lengths say the positions")
            cache.check_config(self.blocks)
            cache.check_rows(x.shape[0])
            with cache.transaction():
                return self._forward_over_cache(x, cache, attention_mask, factors)
        if layout is None:
            layout = TokenLayout.of(
                x, self.rotary, self.blocks,
                attention_mask=attention_mask, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, position_ids=position_ids,
            )  # fmt: skip
        q, k, v = self._inputs(layout.sort(x), layout.cos, layout.sin)
        if layout.counts is not None:
            k, v = layout.to_the_left(k), layout.to_the_left(v)
        out = infllm_v2_attention(q, k, v, self.config, cu_seqlens_q=layout.cu_seqlens, seqlens_k=layout.counts)
        return layout.unsort(self.o_proj(layout.without_padding(out).flatten(2)), x)

    def _forward_over_cache(
        self, x: Tensor, cache: LayerCache, attention_mask: Tensor | None, factors: RotaryFactors | None
    ) -> Tensor:
        b, t, _ = x.shape
        counted, order = padding(attention_mask, b, t)
        counts = None if counted is None else counted.tolist()
        past = cache.lengths or [0] * b
        if counts is None and len(set(past)) <= 1:
            cos, sin = (factors or RotaryFactors(self.rotary)).evenly_spaced(x, past[0] if past else 0, t)
        else:
            cos, sin = self.rotary(x, column_positions(past, counts, t, x.device))
        layout = TokenLayout(cos, sin, cos, sin, counts=counted, order=order)
        q, k, v = self._inputs(layout.sort(x), cos, sin)
        pooled, raw, _ = cache.update(Branches.of_tokens(k, v, k, v, k, v), self._pool_run, counts=counts)
        seqlens_k = raw.where.seqlens_k
        out = infllm_v2_attention(q, raw.k, raw.v, self.config, k_pool=pooled.k, seqlens_k=seqlens_k)
        # In a chunk, the columns before a row's tokens fall on positions of its past; they are still padding.
        return layout.unsort(self.o_proj(layout.without_padding(out).flatten(2)), x)

    def _pool_run(self, k: Tensor, v: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """The pooled keys of a run of tokens. A cache keeps a value beside each; nobody reads it."""
        pooled = phi_mean(blocks_of(k.detach(), self.blocks))
        return pooled, v.detach()[:, : pooled.shape[1]]

    def input_projections(self) -> list[nn.Module]:
        return [self.q_proj, self.k_proj, self.v_proj]

    def can_step(self) -> bool:
        """Whether the device can take a decoding step alone: not yet, a cache's `append` reads lengths."""
        return False

    @torch.no_grad()
    def select(self, x: Float[Tensor, "b t hidden"]) -> tuple[Float[Tensor, "b t g blocks"], Int[Tensor, "b t g n"]]:
        """What this layer would read of whole sequences x: the block scores and the lists of blocks."""
        layout = TokenLayout.of(x, self.rotary, self.blocks)
        q, k, _ = self._inputs(x, layout.cos, layout.sin)
        k_pool, s = compress(k, phi_mean, self.blocks), x.shape[1]
        lists = select_by_pooled_keys(q, k_pool, self.config, num_keys=s)
        return pooled_scores(q, k_pool, self.config, num_keys=s), lists

    def num_parameters(self) -> int:
        """Parameters of the layer."""
        return sum(parameter.numel() for parameter in self.parameters())

    def cache_bytes_per_token(self) -> float:
        """Bytes that a long sequence adds to the cache with each token: a pair, and 1/kernel_stride of a pooled one."""
        pair = self.num_kv_heads * (self.head_dim + self.v_head_dim) * self.k_proj.weight.element_size()
        return pair * (1 + 1 / self.config.kernel_stride)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, {self.config}"

    def _inputs(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q and k rotated, and v."""
        q, k, v = self._heads(project(x, self.input_projections()))
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def _heads(self, projected: Sequence[Tensor]) -> list[Tensor]:
        """Queries, keys and values [b, t, heads, d] of what `input_projections` give."""
        widths = (self.head_dim, self.head_dim, self.v_head_dim)
        return [part.unflatten(-1, (-1, width)) for part, width in zip(projected, widths, strict=True)]
