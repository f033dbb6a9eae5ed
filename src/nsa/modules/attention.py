"""The NSA layer: from hidden states to hidden states, with or without a cache."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nsa.cache import LayerCache
from nsa.cache_tensors import CacheTensors
from nsa.config import NSAConfig
from nsa.decode_step import DecodeStep
from nsa.decoding import append_tokens, decode_attention
from nsa.distributed.attention import context_parallel_attention
from nsa.distributed.layout import ContextLayout
from nsa.functional import attend_to_branches
from nsa.modules.compression import Compression
from nsa.modules.layer import SparseLayer
from nsa.modules.projections import StartingLinear, project
from nsa.modules.rotary import Rotary, RotaryFactors, rotate
from nsa.modules.selector_loss import QUERIES, selector_loss, with_loss
from nsa.modules.token_layout import TokenLayout
from nsa.ops.compress import blocks_of
from nsa.ops.selection import block_scores, select_blocks
from nsa.streams import Branches, Stream


class NativeSparseAttention(SparseLayer):
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
            (`nsa.modules.selector_loss`) to what is differentiated; a ValueError where ranks share sequences or heads.
        selector_queries: of a batch, that it looks at.

    Raises:
        ValueError: head counts or dims that do not fit.
    """

    NAME, SIZES = "NativeSparseAttention", NSAConfig
    config: NSAConfig
    selector_weight: float = 0.0
    selector_queries: int = QUERIES

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
        super().__init__(hidden_size, num_heads, num_kv_heads, head_dim, v_head_dim, config, rotary, rope_theta)
        config, head_dim, v_head_dim = self.config, self.head_dim, self.v_head_dim
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

    def attend(self, x: Float[Tensor, "b t hidden"], layout: TokenLayout) -> Float[Tensor, "b t h e"]:
        learns = self._learns_to_choose(self.compress_k.heads_of is None)
        q, tokens, gates = self._inputs(x, layout.cos, layout.sin)
        if layout.counts is not None:
            k_raw, v_raw, *rest = tokens.tensors
            *rest, k_raw, v_raw = map(layout.to_the_left, (*rest, k_raw, v_raw))
            tokens = Branches.of_tokens(k_raw, v_raw, *rest)
        compressed = self._compress(tokens.cmp, layout)
        lengths = (layout.cu_seqlens, None, layout.counts, layout.counts)
        branches = Branches.of(self.config, (*compressed, *tokens.tensors[2:]), lengths)
        longest = layout.max_seqlen
        out = attend_to_branches(q, branches, gates, self.config, max_seqlen_k=longest, nonnegative_gates=True)
        if learns and q.numel():  # no tokens have no loss
            k_cmp = self._keys_to_choose(x.detach(), layout)
            loss = selector_loss(q, branches.slc.k, k_cmp, layout, self.config, self.selector_queries)
            out = with_loss(out, loss, self.selector_weight)
        return out

    def attend_after(
        self, x: Tensor, layout: TokenLayout, cache: LayerCache, counts: list[int] | None, factors: RotaryFactors
    ) -> Float[Tensor, "b t h e"]:
        q, tokens, gates = self._inputs(x, layout.cos, layout.sin)
        branches = cache.update(tokens, partial(self._compress_run, factors=factors), counts=counts)
        return attend_to_branches(q, branches, gates, self.config, nonnegative_gates=True)

    def attend_in_context(self, x: Tensor, layout: ContextLayout) -> Float[Tensor, "b t h e"]:
        self._learns_to_choose(False)
        q, tokens, gates = self._inputs(x, layout.cos, layout.sin)
        return context_parallel_attention(q, tokens, gates, layout, self._compress_blocks)

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

    @torch.no_grad()
    def select(self, x: Float[Tensor, "b t hidden"]) -> tuple[Float[Tensor, "b t g blocks"], Int[Tensor, "b t g n"]]:
        """What this layer would read of whole sequences x: the block scores and the selected block indices."""
        layout = TokenLayout.of(x, self.rotary, self.config)
        q, tokens, _ = self._inputs(x, layout.cos, layout.sin)
        k_cmp, _ = self._compress(tokens.cmp, layout)
        return block_scores(q, k_cmp, self.config), select_blocks(q, k_cmp, self.config)

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

    def _keys(self, projected: Tensor) -> Tensor:
        """One branch's keys as `_heads` gives them."""
        return projected.unflatten(-1, (-1, self.head_dim))

    def _gates(self, x: Float[Tensor, "b t h3"]) -> Float[Tensor, "b t h 3"]:
        """Scalars in (0, 1) for each query head: compressed, selected, window."""
        return x.sigmoid().unflatten(-1, (-1, 3))

    def _compress(self, raw: Stream, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        """The compressed keys, rotated, and values of whole sequences."""
        k, v = self._blocks(raw.k, layout), self._blocks(raw.v, layout)
        return self._compress_blocks(k, v, layout.cos_cmp, layout.sin_cmp)

    def _learns_to_choose(self, has_all: bool) -> bool:
        """Whether the selector's loss is added; an error unless this rank has whole sequences and all heads."""
        learns = self.selector_weight > 0 and torch.is_grad_enabled()
        if learns and not has_all:
            raise ValueError(
                "NativeSparseAttention: the selector's loss needs whole sequences and all heads on a rank: expected "
                f"selector_weight=0, got {self.selector_weight:g}"
            )
        return learns

    def _keys_to_choose(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """The compressed keys alone. The selector's loss takes x as it is: it trains what makes keys of x, not x."""
        raw = self._keys((self.k_proj if self.config.shared_kv else self.k_proj_cmp)(x))
        raw = raw if layout.counts is None else layout.to_the_left(raw)
        return rotate(self.compress_k(self._blocks(raw, layout)), layout.cos_cmp, layout.sin_cmp)

    def _blocks(self, x: Tensor, layout: TokenLayout) -> Tensor:
        return blocks_of(x, self.config) if layout.blocks is None else layout.blocks.gather(x)

    def _compress_blocks(self, k_blocks: Tensor, v_blocks: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return rotate(self.compress_k(k_blocks), cos, sin), self.compress_v(v_blocks)

    def _compress_run(self, k_raw: Tensor, v_raw: Tensor, first: int, factors: RotaryFactors) -> tuple[Tensor, Tensor]:
        """Compress raw tokens that begin at block `first`."""
        k_cmp, v_cmp = self.compress_k(blocks_of(k_raw, self.config)), self.compress_v(blocks_of(v_raw, self.config))
        stride = self.config.compress_stride
        return rotate(k_cmp, *factors.evenly_spaced(k_cmp, first * stride, k_cmp.shape[1], stride)), v_cmp


def _rename_old(module: NativeSparseAttention, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """The gates' map had the name of Llama's MLP's."""
    for name in ("weight", "bias"):
        if (old := f"{prefix}gate_proj.{name}") in state:
            state[f"{prefix}g_proj.{name}"] = state.pop(old)
