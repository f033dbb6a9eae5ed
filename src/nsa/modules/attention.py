"""The NSA layer: from hidden states to hidden states, with or without a cache."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nsa.cache import FixedNSACache, LayerCache
from nsa.cache_tensors import CacheTensors
from nsa.config import NSAConfig
from nsa.decode_step import DecodeStep
from nsa.decoding import append_tokens, decode_attention
from nsa.distributed import ContextParallel
from nsa.distributed.attention import context_parallel_attention
from nsa.distributed.layout import ContextLayout
from nsa.functional import attend_to_branches
from nsa.modules.compression import Compression
from nsa.modules.projections import StartingLinear, project
from nsa.modules.rotary import Rotary, RotaryEmbedding, RotaryFactors, rotate
from nsa.modules.selector_loss import selector_loss, with_loss
from nsa.modules.token_layout import TokenLayout, padding, step_padding
from nsa.ops.compress import blocks_of
from nsa.ops.selection import block_scores, select_blocks
from nsa.streams import Branches, Stream


class NativeSparseAttention(nn.Module):
    """Native Sparse Attention with its projections (paper, section 3).

    One query projection serves the three branches; each branch has its own keys and values (§3.3.3), or all share
    one pair (`config.shared_kv`). Keys of selection and window are rotated at their own positions; compression
    reads keys before rotation and rotates the compressed key at the block's first position. A linear layer with
    bias and a sigmoid gates every head of every branch; at the start all gates are 1/2 and compression is the mean.

    Args:
        hidden_size: width of x.
        num_heads, num_kv_heads: H and HK; H a multiple of HK.
        head_dim: d_k, even; hidden_size / num_heads by default.
        v_head_dim: d_v, by default head_dim.
        config: block sizes and counts.
        rope_theta: base of the rotary frequencies.
        rotary: replaces the rotary embedding; called with (x, positions), returns cos and sin [b, t, head_dim].
        bias: whether the projections of q, k, v and the output have one.

    Attributes:
        context: where it is set, x and the other arguments are one rank's part of sequences that several ranks hold
            (`nsa.distributed`).
        selector_weight: where it is above 0, every backward of whole sequences adds this times the selector's own loss
            (`nsa.modules.selector_loss`) to what is differentiated.

    Raises:
        ValueError: head counts or dims that do not fit.
    """

    context: ContextParallel | None = None
    selector_weight: float = 0.0

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int | None = None,
        v_head_dim: int | None = None,
        config: NSAConfig | None = None,
        *,
        rope_theta: float = 10000.0,
        rotary: Rotary | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(
                "NativeSparseAttention: num_heads should be a multiple of num_kv_heads, "
                f"got {num_heads} and {num_kv_heads}"
            )
        if head_dim is None and hidden_size % num_heads:
            raise ValueError(
                "NativeSparseAttention: give head_dim, or a hidden_size divisible by num_heads; "
                f"got {hidden_size} and {num_heads}"
            )
        if config is not None and not isinstance(config, NSAConfig):
            raise ValueError(
                "NativeSparseAttention: config should be an NSAConfig (NSAConfig.from_dict), "
                f"got {type(config).__name__}"
            )
        self.config = config = config or NSAConfig()
        self.hidden_size, self.num_heads, self.num_kv_heads = hidden_size, num_heads, num_kv_heads
        self.head_dim = head_dim = head_dim or hidden_size // num_heads
        self.v_head_dim = v_head_dim = v_head_dim or head_dim
        self.rotary = rotary or RotaryEmbedding(head_dim, rope_theta)

        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)  # selection, or all branches
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * v_head_dim, bias=bias)
        if not config.shared_kv:
            self.k_proj_cmp = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
            self.v_proj_cmp = nn.Linear(hidden_size, num_kv_heads * v_head_dim, bias=bias)
            self.k_proj_win = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
            self.v_proj_win = nn.Linear(hidden_size, num_kv_heads * v_head_dim, bias=bias)
        self.compress_k = Compression(head_dim, config)
        self.compress_v = Compression(v_head_dim, config)
        self.g_proj = StartingLinear(hidden_size, 3 * num_heads, torch.zeros_like)  # all gates 1/2
        self.o_proj = nn.Linear(num_heads * v_head_dim, hidden_size, bias=bias)
        self.register_load_state_dict_pre_hook(_rename_old)

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

        Args:
            x: hidden states of the new tokens.
            cache: remembers these tokens and gives those before them, in any layout; every split of a sequence into
                calls gives the same numbers as one call. In a static or paged cache few tokens (t <= cache.max_new)
                are a decoding step: kernels made for it, where they can serve, and nothing waits for the device.
            attention_mask: [b, at least t], nonzero where a token is; only the last t columns matter, and padding
                may lie anywhere among them.
            cu_seqlens: packed sequences, which follow one another through all rows (no cache): from 0 to b t, rising;
                empty ones are legal. They stay on the device and are trusted.
            max_seqlen: a bound on the longest of them, trusted: it spares the selection work.
            position_ids: positions for the rotation, [b or 1, t]; by default every sequence begins at 0. They do not
                say where sequences begin: `cu_seqlens` does. Not with a cache.
            layout: made of the four before (`TokenLayout.of`), for layers that share it.
            factors: the same for layers over a cache.

        Returns:
            [b, t, hidden_size]; rows of padding carry only the output projection's bias.

        Raises:
            ValueError: shapes that do not fit, arguments that exclude each other, or a cache that was made for another
                configuration. After any exception the cache is what it was.
        """
        expected = f"[b, t, hidden={self.hidden_size}]"
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = getattr(x, "dtype", type(x).__name__)
            raise ValueError(f"NativeSparseAttention: x should be a tensor {expected} of floating point, got {got}")
        if x.dim() != 3 or x.shape[2] != self.hidden_size:
            raise ValueError(f"NativeSparseAttention: x should have shape {expected}, got {list(x.shape)}")
        if self.context is not None:
            return self._forward_in_context(x, self.context, cache, attention_mask, layout, {
                "cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen, "position_ids": position_ids,
            })  # fmt: skip
        assert not isinstance(layout, ContextLayout)
        if cache is not None:
            if cu_seqlens is not None or position_ids is not None:
                given = "cu_seqlens" if cu_seqlens is not None else "position_ids"
                raise ValueError(
                    f"NativeSparseAttention: {given} does not go with a cache, whose lengths say the positions"
                )
            cache.check_config(self.config)
            cache.check_rows(x.shape[0])
            with cache.transaction():
                return self._forward_over_cache(x, cache, attention_mask, factors)
        if layout is None:
            layout = TokenLayout.of(
                x, self.rotary, self.config,
                attention_mask=attention_mask, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, position_ids=position_ids,
            )  # fmt: skip
        q, tokens, gates = self._inputs(layout.sort(x), layout.cos, layout.sin)
        if layout.counts is not None:
            k_raw, v_raw, *rest = tokens.tensors
            *rest, k_raw, v_raw = map(layout.to_the_left, (*rest, k_raw, v_raw))
            tokens = Branches.of_tokens(k_raw, v_raw, *rest)
        compressed = self._compress(tokens.cmp, layout)
        lengths = (layout.cu_seqlens, None, layout.counts, layout.counts)
        branches = Branches.of(self.config, (*compressed, *tokens.tensors[2:]), lengths)
        longest = layout.max_seqlen
        out = attend_to_branches(q, branches, gates, self.config, max_seqlen_k=longest, nonnegative_gates=True)
        if self.selector_weight and torch.is_grad_enabled():
            loss = selector_loss(q, branches.slc.k, branches.cmp.k, layout, self.config)
            out = with_loss(out, loss, self.selector_weight)
        return layout.unsort(self.o_proj(layout.without_padding(out).flatten(2)), x)

    def _forward_in_context(
        self, x: Tensor, context: ContextParallel, cache: LayerCache | None, mask: Tensor | None,
        layout: TokenLayout | ContextLayout | None, sequences: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        if cache is not None or mask is not None:
            given = "cache" if cache is not None else "attention_mask"
            raise ValueError(f"NativeSparseAttention: {given} does not go with context parallelism; expected None")
        if layout is None:
            layout = ContextLayout.of(x, self.rotary, self.config, context, **sequences)
        assert isinstance(layout, ContextLayout)
        q, tokens, gates = self._inputs(x, layout.cos, layout.sin)
        out = context_parallel_attention(q, tokens, gates, layout, self._compress_blocks)
        return self.o_proj(out.flatten(2))

    def _forward_over_cache(
        self, x: Tensor, cache: LayerCache, attention_mask: Tensor | None, factors: RotaryFactors | None
    ) -> Tensor:
        b, t, _ = x.shape
        if cache.is_step(t) and self.can_step():
            assert isinstance(cache, FixedNSACache)
            return self._decode_columns(x, cache, attention_mask)
        counted, order = padding(attention_mask, b, t)
        counts = None if counted is None else counted.tolist()
        past = cache.lengths or [0] * b
        factors = factors or RotaryFactors(self.rotary)
        if counts is None and len(set(past)) <= 1:
            cos, sin = factors.evenly_spaced(x, past[0] if past else 0, t)
        else:
            cos, sin = self.rotary(x, column_positions(past, counts, t, x.device))
        layout = TokenLayout(cos, sin, cos, sin, counts=counted, order=order)
        q, tokens, gates = self._inputs(layout.sort(x), cos, sin)
        branches = cache.update(tokens, partial(self._compress_run, factors=factors), counts=counts)
        out = attend_to_branches(q, branches, gates, self.config, nonnegative_gates=True)
        # In a chunk, the columns before a row's tokens fall on positions of its past; they are still padding.
        return layout.unsort(self.o_proj(layout.without_padding(out).flatten(2)), x)

    def input_projections(self) -> list[nn.Module]:
        """q, k, v; and those of the window's and of compression's keys and values where they have their own."""
        own: list[nn.Module] = [self.q_proj, self.k_proj, self.v_proj]
        if self.config.shared_kv:
            return own
        return [*own, self.k_proj_win, self.v_proj_win, self.k_proj_cmp, self.v_proj_cmp]

    def can_step(self) -> bool:
        """Whether `decode` serves: phi is its weights and nothing else."""
        return self.compress_k.is_plain() and self.compress_v.is_plain()

    def decode(
        self, x: Float[Tensor, "b t hidden"], tensors: CacheTensors, step: DecodeStep
    ) -> Float[Tensor, "b t hidden"]:
        """Attention output of a decoding step; the tokens are appended to `tensors`, whose lengths advance.

        All of it happens on the device, at fixed addresses: a CUDA graph can hold it. The cache that owns the tensors
        has been told by `make_room`. Columns before a row's tokens are padding and carry only the output's bias.
        """
        projected = [projection(x) for projection in self.input_projections()]
        return self.o_proj(self.decode_heads(projected, self._gates(self.g_proj(x)), tensors, step).flatten(2))

    def decode_heads(
        self, projected: Sequence[Tensor], gates: Float[Tensor, "b t h 3"], tensors: CacheTensors, step: DecodeStep
    ) -> Float[Tensor, "b t h e"]:
        """`decode` between its projections: `projected` are [b, t, .] in the order of `input_projections`."""
        q, k, v, *rest = self._heads(projected)
        k_win, v_win, k_raw, v_raw = rest or (k, v, k, v)
        new = Branches.of_tokens(k_raw, v_raw, k, v, k_win, v_win)
        append_tokens(tensors, new, self.config, (self.compress_k.weights(), self.compress_v.weights()), step)
        return decode_attention(q, gates, tensors, self.config, counts=step.counts, cos=step.cos, sin=step.sin)

    def _decode_columns(self, x: Tensor, cache: FixedNSACache, attention_mask: Tensor | None) -> Tensor:
        """A decoding step of this layer by itself."""
        b, t, _ = x.shape
        counts, order = step_padding(attention_mask, b, t)
        if order is not None:
            x = x.gather(1, order.unsqueeze(-1).expand_as(x))
        cache.make_room(t, counts)
        tensors = cache.tensors
        y = self.decode(x, tensors, DecodeStep.after(tensors.lengths, t, counts, self.config, self.rotary, x))
        return y if order is None else torch.empty_like(y).scatter(1, order.unsqueeze(-1).expand_as(y), y)

    @torch.no_grad()
    def select(self, x: Float[Tensor, "b t hidden"]) -> tuple[Float[Tensor, "b t g blocks"], Int[Tensor, "b t g n"]]:
        """What this layer would read of whole sequences x: the block scores and the selected block indices."""
        layout = TokenLayout.of(x, self.rotary, self.config)
        q, tokens, _ = self._inputs(x, layout.cos, layout.sin)
        k_cmp, _ = self._compress(tokens.cmp, layout)
        return block_scores(q, k_cmp, self.config), select_blocks(q, k_cmp, self.config)

    def num_parameters(self) -> int:
        """Parameters of the layer."""
        return sum(parameter.numel() for parameter in self.parameters())

    def cache_bytes_per_token(self) -> float:
        """Bytes that a long sequence adds to the cache with each token: one raw pair and 1/d of a compressed pair."""
        pair = self.num_kv_heads * (self.head_dim + self.v_head_dim) * self.k_proj.weight.element_size()
        return pair * (1 + 1 / self.config.compress_stride)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, {self.config}"

    def _inputs(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Branches, Tensor]:
        """q rotated; keys, rotated but for those of compression, and values; gates."""
        *projected, gates = project(x, [*self.input_projections(), self.g_proj])
        q, k, v, *rest = self._heads(projected)
        q, rotated, gates = rotate(q, cos, sin), rotate(k, cos, sin), self._gates(gates)
        if self.config.shared_kv:
            return q, Branches.of_tokens(k, v, rotated, v, rotated, v), gates
        k_win, v_win, k_raw, v_raw = rest
        return q, Branches.of_tokens(k_raw, v_raw, rotated, v, rotate(k_win, cos, sin), v_win), gates

    def _heads(self, projected: Sequence[Tensor]) -> list[Tensor]:
        """Queries, keys and values [b, t, heads, d] of what `input_projections` give: all heads, or a rank's own."""
        dims = (self.head_dim, *(self.head_dim, self.v_head_dim) * (len(projected) // 2))
        return [part.unflatten(-1, (-1, dim)) for part, dim in zip(projected, dims, strict=True)]

    def _gates(self, x: Float[Tensor, "b t h3"]) -> Float[Tensor, "b t h 3"]:
        """Scalars in (0, 1) for each query head: compressed, selected, window."""
        return x.sigmoid().unflatten(-1, (-1, 3))

    def _compress(self, raw: Stream, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        """The compressed keys, rotated, and values of whole sequences."""
        k_blocks, v_blocks = (
            blocks_of(x, self.config) if layout.blocks is None else layout.blocks.gather(x) for x in (raw.k, raw.v)
        )
        return self._compress_blocks(k_blocks, v_blocks, layout.cos_cmp, layout.sin_cmp)

    def _compress_blocks(self, k_blocks: Tensor, v_blocks: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return rotate(self.compress_k(k_blocks), cos, sin), self.compress_v(v_blocks)

    def _compress_run(self, k_raw: Tensor, v_raw: Tensor, first: int, factors: RotaryFactors) -> tuple[Tensor, Tensor]:
        """Compress raw tokens that begin at block `first`."""
        k_cmp, v_cmp = self.compress_k(blocks_of(k_raw, self.config)), self.compress_v(blocks_of(v_raw, self.config))
        stride = self.config.compress_stride
        return rotate(k_cmp, *factors.evenly_spaced(k_cmp, first * stride, k_cmp.shape[1], stride)), v_cmp


def column_positions(past: list[int], counts: list[int] | None, t: int, device: torch.device) -> Int[Tensor, "b t"]:
    """Position of every column in its own sequence; 0 for padding."""
    counts = [t] * len(past) if counts is None else counts
    first = torch.tensor([p + n - t for p, n in zip(past, counts, strict=True)], device=device)
    return (first[:, None] + torch.arange(t, device=device)).clamp(min=0)


def _rename_old(module: NativeSparseAttention, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """The gates' map had the name of Llama's MLP's."""
    for name in ("weight", "bias"):
        if (old := f"{prefix}gate_proj.{name}") in state:
            state[f"{prefix}g_proj.{name}"] = state.pop(old)
