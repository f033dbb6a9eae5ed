"""The NSA layer: from hidden states to hidden states, with or without a cache."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor, nn

from nsa.cache import FixedNSACache, LayerCache
from nsa.cache_tensors import CacheTensors
from nsa.config import NSAConfig
from nsa.decoding import append_tokens, decode_attention
from nsa.functional import native_sparse_attention
from nsa.modules.compression import Compression
from nsa.modules.rotary import RotaryEmbedding, rotate
from nsa.ops.compress import compress
from nsa.ops.selection import block_scores, select_blocks
from nsa.shapes import Sequences


class Gates(nn.Linear):
    """sigmoid(W x + b): a scalar in (0, 1) per query head and branch (cmp, slc, win); all 1/2 at the start."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__(hidden_size, 3 * num_heads)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Float[Tensor, "b t hidden"]) -> Float[Tensor, "b t h 3"]:
        return super().forward(x).sigmoid().unflatten(-1, (-1, 3))


Rotary = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class RotaryFactors:
    """cos and sin of evenly spaced positions, each run of them computed once for all layers of one forward pass."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    def evenly_spaced(
        self, rotary: Rotary, like: Tensor, first: int, count: int, stride: int = 1
    ) -> tuple[Float[Tensor, "1 count d"], Float[Tensor, "1 count d"]]:
        """Of the positions first, first + stride, .. in like's dtype, on its device."""
        key = (first, count, stride, like.dtype, like.device)
        if key not in self._known:
            positions = torch.arange(first, first + count * stride, stride, device=like.device)
            self._known[key] = rotary(like, positions[None])
        return self._known[key]


@dataclass(frozen=True)
class DecodeStep:
    """What all layers of a decoding step of t new tokens share, on the device, from the lengths before it.

    counts: how many of the t columns are tokens, the last ones of each row; None where all are.
    cos, sin: rotary factors of the columns.
    cos_cmp, sin_cmp: those of the compressed keys whose blocks may complete.
    """

    counts: Int32[Tensor, " b"] | None
    cos: Float[Tensor, "b t d"]
    sin: Float[Tensor, "b t d"]
    cos_cmp: Float[Tensor, "b new d"]
    sin_cmp: Float[Tensor, "b new d"]

    @classmethod
    def after(
        cls,
        lengths: Int32[Tensor, " b"],
        t: int,
        counts: Int32[Tensor, " b"] | None,
        config: NSAConfig,
        rotary: Rotary,
        like: Tensor,
    ) -> "DecodeStep":
        """The step of t columns after `lengths` tokens; `like` gives the factors' dtype and device."""
        first = lengths + (0 if counts is None else counts - t)
        positions = first[:, None] + torch.arange(t, device=lengths.device)
        # The block that ends with stride number c begins at (c + 1) d - l; c = length // d is the first to complete.
        stride = config.compress_stride
        strides = lengths[:, None] // stride + torch.arange(-(-t // stride), device=lengths.device)
        blocks = (strides + 1) * stride - config.compress_block_size
        factors = rotary(like, torch.cat([positions, blocks], dim=1).clamp(min=0))
        (cos, cos_cmp), (sin, sin_cmp) = ((x[:, :t].contiguous(), x[:, t:].contiguous()) for x in factors)
        return cls(counts, cos, sin, cos_cmp, sin_cmp)


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

    Raises:
        ValueError: head counts or dims that do not fit.
    """

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
        self.gate_proj = Gates(hidden_size, num_heads)
        self.o_proj = nn.Linear(num_heads * v_head_dim, hidden_size, bias=bias)

    def forward(
        self,
        x: Float[Tensor, "b t hidden"],
        *,
        cache: LayerCache | None = None,
        attention_mask: Tensor | None = None,
        cu_seqlens: Int[Tensor, " sequences_plus_1"] | None = None,
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
            cu_seqlens: packed sequences (b == 1, no cache).
            factors: of the rotary embedding, for layers that share it: what one computes the next ones take.

        Returns:
            [b, t, hidden_size]; rows of padding carry only the output projection's bias.

        Raises:
            ValueError: shapes that do not fit, or cu_seqlens together with a cache or mask.
        """
        b, t, width = x.shape
        if width != self.hidden_size:
            raise ValueError(f"NativeSparseAttention: expected x of width {self.hidden_size}, got {list(x.shape)}")
        if cu_seqlens is not None and (cache is not None or attention_mask is not None):
            raise ValueError("NativeSparseAttention: cu_seqlens goes with neither a cache nor an attention_mask")
        if isinstance(cache, FixedNSACache) and cache.can_step(t) and not torch.is_grad_enabled():
            return self._decode_columns(x, cache, attention_mask)
        counts = order = None
        if attention_mask is not None:
            counts, order = _padding(attention_mask, b, t)
        if order is not None:
            x = x.gather(1, order.unsqueeze(-1).expand_as(x))

        past = cache.lengths if cache is not None and cache.lengths else [0] * b
        factors = RotaryFactors() if factors is None else factors
        if counts is None and cu_seqlens is None and len(set(past)) <= 1:
            cos, sin = factors.evenly_spaced(self.rotary, x, past[0] if past else 0, t)
        else:
            cos, sin = self.rotary(x, _positions(past, counts, t, cu_seqlens, x.device))
        q = rotate(self._heads(self.q_proj, x), cos, sin)
        k, v, k_win, v_win, k_raw, v_raw = self._keys_and_values(x, cos, sin)
        gates = self.gate_proj(x)

        if cache is not None:
            compress_run = partial(self._compress_run, factors=factors)
            views = cache.append(k, v, k_win, v_win, k_raw, v_raw, compress_run, counts=counts)
            k, v, k_win, v_win = views.k, views.v, views.k_win, views.v_win
            k_cmp, v_cmp = views.k_cmp, views.v_cmp
            seqlens_k, seqlens_win = views.seqlens_k, views.seqlens_win
        else:
            seqlens_k = seqlens_win = None
            if counts is not None:
                seqlens_k = seqlens_win = torch.tensor(counts, device=x.device)
                shift = _left_aligned(counts, t, x.device)
                k, v, k_win, v_win, k_raw, v_raw = (
                    y.gather(1, shift[:, :, None, None].expand_as(y)) for y in (k, v, k_win, v_win, k_raw, v_raw)
                )
            k_cmp, v_cmp = self._compress_whole(k_raw, v_raw, Sequences(cu_seqlens))

        out = native_sparse_attention(
            q,
            k,
            v,
            gates,
            self.config,
            k_cmp=k_cmp,
            v_cmp=v_cmp,
            k_win=k_win,
            v_win=v_win,
            cu_seqlens_q=cu_seqlens,
            seqlens_k=seqlens_k,
            seqlens_win=seqlens_win,
            nonnegative_gates=True,
        )
        if counts is not None:
            # In a chunk, the columns before a row's tokens fall on positions of its past; they are still padding.
            padding = torch.arange(t, device=x.device) < t - torch.tensor(counts, device=x.device)[:, None]
            out = out.masked_fill(padding[:, :, None, None], 0.0)
        y = self.o_proj(out.flatten(2))
        if order is not None:
            y = torch.empty_like(y).scatter(1, order.unsqueeze(-1).expand_as(y), y)
        return y

    def input_projections(self) -> list[nn.Linear]:
        """q, k, v; and those of the window's and of compression's keys and values where they have their own."""
        own = [self.q_proj, self.k_proj, self.v_proj]
        if self.config.shared_kv:
            return own
        return [*own, self.k_proj_win, self.v_proj_win, self.k_proj_cmp, self.v_proj_cmp]

    def decode(
        self, x: Float[Tensor, "b t hidden"], tensors: CacheTensors, step: DecodeStep
    ) -> Float[Tensor, "b t hidden"]:
        """Attention output of a decoding step; the tokens are appended to `tensors`, whose lengths advance.

        All of it happens on the device, at fixed addresses: a CUDA graph can hold it. The cache that owns the tensors
        has been told by `make_room`. Columns before a row's tokens are padding and carry only the output's bias.
        """
        projected = [projection(x) for projection in self.input_projections()]
        return self.o_proj(self.decode_heads(projected, self.gate_proj(x), tensors, step).flatten(2))

    def decode_heads(
        self, projected: Sequence[Tensor], gates: Float[Tensor, "b t h 3"], tensors: CacheTensors, step: DecodeStep
    ) -> Float[Tensor, "b t h e"]:
        """`decode` between its projections: `projected` are [b, t, .] in the order of `input_projections`."""
        q = projected[0].unflatten(-1, (self.num_heads, self.head_dim))
        k, v, *rest = (part.unflatten(-1, (self.num_kv_heads, -1)) for part in projected[1:])
        k_win, v_win, k_raw, v_raw = rest or (None, None, k, v)
        append_tokens(
            tensors, k, v, k_win, v_win, k_raw, v_raw, self.config, self.compress_k.weights(),
            self.compress_v.weights(), step.cos_cmp, step.sin_cmp, counts=step.counts, cos=step.cos, sin=step.sin,
        )  # fmt: skip
        return decode_attention(q, gates, tensors, self.config, counts=step.counts, cos=step.cos, sin=step.sin)

    def _decode_columns(self, x: Tensor, cache: FixedNSACache, attention_mask: Tensor | None) -> Tensor:
        """A decoding step of this layer by itself."""
        b, t, _ = x.shape
        cache.check_rows(b)
        counts, order = step_padding(attention_mask, b, t)
        if order is not None:
            x = x.gather(1, order.unsqueeze(-1).expand_as(x))
        cache.make_room(t, some_may_wait=counts is not None)
        tensors = cache.tensors
        y = self.decode(x, tensors, DecodeStep.after(tensors.lengths, t, counts, self.config, self.rotary, x))
        return y if order is None else torch.empty_like(y).scatter(1, order.unsqueeze(-1).expand_as(y), y)

    @torch.no_grad()
    def select(self, x: Float[Tensor, "b t hidden"]) -> tuple[Float[Tensor, "b t g blocks"], Int[Tensor, "b t g n"]]:
        """What this layer would read of whole sequences x: the block scores and the selected block indices."""
        cos, sin = self.rotary(x, torch.arange(x.shape[1], device=x.device)[None])
        q = rotate(self._heads(self.q_proj, x), cos, sin)
        *_, k_raw, v_raw = self._keys_and_values(x, cos, sin)
        k_cmp, _ = self._compress_whole(k_raw, v_raw, Sequences())
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

    def _heads(self, projection: nn.Module, x: Tensor) -> Tensor:
        dim = self.head_dim if projection in (self.q_proj, self.k_proj) else None
        heads = self.num_heads if projection is self.q_proj else self.num_kv_heads
        return projection(x).unflatten(-1, (heads, dim or -1))

    def _keys_and_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        """k, v, k_win, v_win rotated; k_raw, v_raw for compression."""
        k, v = self._heads(self.k_proj, x), self._heads(self.v_proj, x)
        if self.config.shared_kv:
            rotated = rotate(k, cos, sin)
            return rotated, v, rotated, v, k, v
        k_win, v_win = self._heads(self.k_proj_win, x), self._heads(self.v_proj_win, x)
        k_raw, v_raw = self._heads(self.k_proj_cmp, x), self._heads(self.v_proj_cmp, x)
        return rotate(k, cos, sin), v, rotate(k_win, cos, sin), v_win, k_raw, v_raw

    def _compress_run(
        self, k_raw: Tensor, v_raw: Tensor, first: int, factors: RotaryFactors | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compress raw tokens that begin at block `first`; the keys are rotated at their blocks' first positions."""
        k_cmp = compress(k_raw, self.compress_k, self.config)
        v_cmp = compress(v_raw, self.compress_v, self.config)
        factors, stride = factors or RotaryFactors(), self.config.compress_stride
        cos, sin = factors.evenly_spaced(self.rotary, k_cmp, first * stride, k_cmp.shape[1], stride)
        return rotate(k_cmp, cos, sin), v_cmp

    def _compress_whole(self, k_raw: Tensor, v_raw: Tensor, sequences: Sequences) -> tuple[Tensor, Tensor]:
        if not sequences.is_packed:
            return self._compress_run(k_raw, v_raw, 0)
        parts = list(sequences.parts(self.config, 1, k_raw.shape[1], k_raw.shape[1]))
        own = [slice(part.k_start, part.k_start + part.num_keys) for part in parts]
        runs = [self._compress_run(k_raw[:, one], v_raw[:, one], 0) for one in own]
        return torch.cat([k for k, _ in runs], dim=1), torch.cat([v for _, v in runs], dim=1)


def step_padding(mask: Tensor | None, b: int, t: int) -> tuple[Tensor | None, Tensor | None]:
    """`_padding` without asking the device: tokens of each row, and the order; None where there is no mask."""
    if mask is None:
        return None, None
    is_token = _last_columns(mask, b, t)
    counts = is_token.sum(1, dtype=torch.int32)
    return counts, is_token.to(torch.int8).argsort(dim=1, stable=True) if t > 1 else None


def _last_columns(mask: Tensor, b: int, t: int) -> Tensor:
    if mask.dim() != 2 or mask.shape[0] != b or mask.shape[1] < t:
        raise ValueError(f"attention_mask should have shape [b={b}, at least t={t}], got {list(mask.shape)}")
    return mask[:, mask.shape[1] - t :] != 0


def _padding(mask: Tensor, b: int, t: int) -> tuple[list[int] | None, Tensor | None]:
    """Tokens among the last t columns of each row, and the order that moves padding to the front if it is not."""
    is_token = _last_columns(mask, b, t)
    counts = is_token.sum(1).tolist()
    if all(count == t for count in counts):
        return None, None
    order = is_token.to(torch.int8).argsort(dim=1, stable=True)
    in_front = bool((order == torch.arange(t, device=mask.device)).all())
    return counts, None if in_front else order


def _positions(
    past: list[int], counts: list[int] | None, t: int, cu_seqlens: Tensor | None, device: torch.device
) -> Tensor:
    """Position of every column in its own sequence, [b or 1, t]; 0 for padding."""
    columns = torch.arange(t, device=device)
    if cu_seqlens is not None:
        bounds = cu_seqlens.to(device)
        return (columns - bounds[torch.searchsorted(bounds, columns, right=True) - 1])[None]
    counts = [t] * len(past) if counts is None else counts
    first = torch.tensor([p + n - t for p, n in zip(past, counts, strict=True)], device=device)
    return (first[:, None] + columns).clamp(min=0)


def _left_aligned(counts: list[int], t: int, device: torch.device) -> Tensor:
    """Columns [b, t] that bring each row's last counts[r] tokens to the front."""
    shift = t - torch.tensor(counts, device=device)
    return (torch.arange(t, device=device) + shift[:, None]).clamp(max=t - 1)
