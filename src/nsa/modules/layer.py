"""What the layers of all sparse methods share: their sizes, what `forward` takes, and the way over a cache."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nsa.cache import FixedNSACache, LayerCache
from nsa.cache_tensors import CacheTensors
from nsa.config import InfLLMv2Config, NSAConfig
from nsa.decode_step import DecodeStep
from nsa.distributed import ContextParallel
from nsa.distributed.layout import ContextLayout
from nsa.modules.rotary import Rotary, RotaryEmbedding, RotaryFactors
from nsa.modules.token_layout import TokenLayout, in_order, out_of_order, padding, step_padding


class SparseLayer(nn.Module):
    """From hidden states to hidden states, with or without a cache; a method's layer is a subclass.

    It has `q_proj`, `k_proj`, `v_proj` and `o_proj`, and says how its queries attend to whole sequences (`attend`),
    after a cache (`attend_after`) and to what other ranks hold (`attend_in_context`); where the device can take a
    decoding step alone, also `can_step` and `decode`.

    Attributes:
        config: the method's sizes; blocks: the same in NSA's names, by which caches and layouts go.
        context: where it is set, x and the other arguments are one rank's part of sequences that several ranks hold
            (`nsa.distributed`).
    """

    NAME: str  # in errors
    SIZES: type[NSAConfig] | type[InfLLMv2Config]
    context: ContextParallel | None = None
    config: Any
    k_proj: nn.Linear
    o_proj: nn.Linear

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int | None,
        v_head_dim: int | None,
        config: NSAConfig | InfLLMv2Config | None,
        rotary: Rotary | None,
        rope_theta: float,
    ) -> None:
        super().__init__()
        if num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads:
            got = f"{num_heads} and {num_kv_heads}"
            raise ValueError(f"{self.NAME}: num_heads should be a multiple of num_kv_heads, got {got}")
        if head_dim is None and hidden_size % num_heads:
            got = f"{hidden_size} and {num_heads}"
            raise ValueError(f"{self.NAME}: give head_dim, or a hidden_size divisible by num_heads; got {got}")
        if config is not None and not isinstance(config, self.SIZES):
            kind, got = self.SIZES.__name__, type(config).__name__
            raise ValueError(f"{self.NAME}: config should be an {kind} ({kind}.from_dict), got {got}")
        self.take(config or self.SIZES())
        self.hidden_size, self.num_heads, self.num_kv_heads = hidden_size, num_heads, num_kv_heads
        self.head_dim = head_dim or hidden_size // num_heads
        self.v_head_dim = v_head_dim or self.head_dim
        self.rotary = rotary or RotaryEmbedding(self.head_dim, rope_theta)

    def take(self, config: Any) -> None:
        """Attend by these sizes from now on; no weight depends on those that may change."""
        self.config = config
        self.blocks = config if isinstance(config, NSAConfig) else config.blocks  # torch.compile could not ask for it

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
            raise ValueError(f"{self.NAME}: x should be a tensor {expected} of floating point, got {got}")
        if x.dim() != 3 or x.shape[2] != self.hidden_size:
            raise ValueError(f"{self.NAME}: x should have shape {expected}, got {list(x.shape)}")
        sequences: dict[str, Any] = {
            "cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen, "position_ids": position_ids,
        }  # fmt: skip
        if self.context is not None:
            if cache is not None or attention_mask is not None:
                given = "cache" if cache is not None else "attention_mask"
                raise ValueError(f"{self.NAME}: {given} does not go with context parallelism; expected None")
            if layout is None:
                layout = ContextLayout.of(x, self.rotary, self.blocks, self.context, **sequences)
            assert isinstance(layout, ContextLayout)
            return self.o_proj(self.attend_in_context(x, layout).flatten(2))
        assert not isinstance(layout, ContextLayout)
        if cache is not None:
            if cu_seqlens is not None or position_ids is not None:
                given = "cu_seqlens" if cu_seqlens is not None else "position_ids"
                raise ValueError(f"{self.NAME}: {given} does not go with a cache, whose lengths say the positions")
            cache.check_config(self.blocks)
            cache.check_rows(x.shape[0])
            with cache.transaction():
                if cache.is_step(x.shape[1]) and self.can_step():
                    return self._step(x, cache, attention_mask)
                return self._forward_after(x, cache, attention_mask, factors or RotaryFactors(self.rotary))
        if layout is None:
            layout = TokenLayout.of(x, self.rotary, self.blocks, attention_mask=attention_mask, **sequences)
        return self._projected(self.attend(layout.sort(x), layout), layout, x)

    def _forward_after(self, x: Tensor, cache: LayerCache, mask: Tensor | None, factors: RotaryFactors) -> Tensor:
        b, t, _ = x.shape
        counted, order = padding(mask, b, t)
        counts = None if counted is None else counted.tolist()
        past = cache.lengths or [0] * b
        if counts is None and len(set(past)) <= 1:
            cos, sin = factors.evenly_spaced(x, past[0] if past else 0, t)
        else:
            cos, sin = self.rotary(x, _column_positions(past, counts, t, x.device))
        layout = TokenLayout(cos, sin, cos, sin, counts=counted, order=order)
        # In a chunk, the columns before a row's tokens fall on positions of its past; they are still padding.
        return self._projected(self.attend_after(layout.sort(x), layout, cache, counts, factors), layout, x)

    def _step(self, x: Tensor, cache: LayerCache, mask: Tensor | None) -> Tensor:
        """A decoding step of this layer by itself."""
        assert isinstance(cache, FixedNSACache)
        b, t, _ = x.shape
        counts, order = step_padding(mask, b, t)
        x = in_order(x, order)
        cache.make_room(t, counts)
        tensors = cache.tensors
        y = self.decode(x, tensors, DecodeStep.after(tensors.lengths, t, counts, self.blocks, self.rotary, x))
        return out_of_order(y, order)

    def _projected(self, out: Tensor, layout: TokenLayout, like: Tensor) -> Tensor:
        return layout.unsort(self.o_proj(layout.without_padding(out).flatten(2)), like)

    def attend(self, x: Float[Tensor, "b t hidden"], layout: TokenLayout) -> Float[Tensor, "b t h e"]:
        """Of whole sequences, as `layout` sorts them."""
        raise NotImplementedError

    def attend_after(
        self, x: Tensor, layout: TokenLayout, cache: LayerCache, counts: list[int] | None, factors: RotaryFactors
    ) -> Float[Tensor, "b t h e"]:
        """Of new tokens after those that the cache remembers, which it remembers then too.

        counts: tokens of each row, the last of its columns; None where all are. factors: of compressed keys.
        """
        raise NotImplementedError

    def attend_in_context(self, x: Tensor, layout: ContextLayout) -> Float[Tensor, "b t h e"]:
        """Of one rank's part of sequences that several ranks hold."""
        raise NotImplementedError

    def can_step(self) -> bool:
        """Whether the device can take a decoding step alone, by `decode`."""
        return False

    def decode(
        self, x: Float[Tensor, "b t hidden"], tensors: CacheTensors, step: DecodeStep
    ) -> Float[Tensor, "b t hidden"]:
        """Attention output of a decoding step; the tokens are appended to `tensors`, whose lengths advance.

        All of it happens on the device, at fixed addresses: a CUDA graph can hold it. The cache that owns the tensors
        has been told by `make_room`. Columns before a row's tokens are padding and carry only the output's bias.
        """
        raise NotImplementedError

    def num_parameters(self) -> int:
        """Parameters of the layer."""
        return sum(parameter.numel() for parameter in self.parameters())

    def cache_bytes_per_token(self) -> float:
        """Bytes that a long sequence adds to the cache with each token: a raw pair and 1/d of a compressed pair."""
        pair = self.num_kv_heads * (self.head_dim + self.v_head_dim) * self.k_proj.weight.element_size()
        return pair * (1 + 1 / self.blocks.compress_stride)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, {self.config}"


def _column_positions(past: list[int], counts: list[int] | None, t: int, device: torch.device) -> Int[Tensor, "b t"]:
    """Position of every column in its own sequence; 0 for padding."""
    counts = [t] * len(past) if counts is None else counts
    first = torch.tensor([p + n - t for p, n in zip(past, counts, strict=True)], device=device)
    return (first[:, None] + torch.arange(t, device=device)).clamp(min=0)
