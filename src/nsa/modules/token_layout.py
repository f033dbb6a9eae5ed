"""Where the tokens of a forward pass without a cache lie, and at which angles: made once, shared by all layers.

Everything is a tensor on the device and every shape follows from shapes, so that a training step never waits for the
device and torch.compile sees one graph.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nsa.config import NSAConfig
from nsa.modules.rotary import Rotary
from nsa.ops.packed_blocks import PackedBlocks
from nsa.shapes import check_lengths, packed_positions


@dataclass(frozen=True)
class TokenLayout:
    """Of b rows and t columns. At most one of `cu_seqlens` and `counts` is there.

    cos, sin: rotary factors of the tokens, [b or 1, t, d]; [1, b t, d] where sequences are packed.
    cos_cmp, sin_cmp: those of the compressed keys, which are rotated at their block's first token's position.
    cu_seqlens, blocks: of sequences that follow one another through all rows, int32 from 0 to b t.
    counts: how many of each row's columns are tokens, the last ones once `order` has moved padding to the front.
    max_seqlen: a bound on the longest packed sequence, where one is known.
    order: columns in that order; None where padding is in front already.
    """

    cos: Float[Tensor, "_ t d"]
    sin: Float[Tensor, "_ t d"]
    cos_cmp: Float[Tensor, "_ c d"]
    sin_cmp: Float[Tensor, "_ c d"]
    cu_seqlens: Int[Tensor, " sequences_plus_1"] | None = None
    blocks: PackedBlocks | None = None
    counts: Int[Tensor, " b"] | None = None
    order: Int[Tensor, "b t"] | None = None
    max_seqlen: int | None = None

    @classmethod
    def of(
        cls,
        x: Float[Tensor, "b t hidden"],
        rotary: Rotary,
        config: NSAConfig,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Int[Tensor, " sequences_plus_1"] | None = None,
        max_seqlen: int | None = None,
        position_ids: Int[Tensor, "_ t"] | None = None,
    ) -> "TokenLayout":
        """Of hidden states x; `NativeSparseAttention.forward` says what the others are."""
        b, t, _ = x.shape
        _check(b, t, attention_mask, cu_seqlens, position_ids)
        if position_ids is not None:
            position_ids = position_ids.to(x.device)
        if cu_seqlens is not None:
            bounds = cu_seqlens.to(x.device, torch.int32)
            blocks = PackedBlocks.of(bounds, b * t, config)
            if position_ids is None:
                position_ids = packed_positions(bounds, torch.arange(b * t, device=x.device))
            else:
                position_ids = position_ids.expand(b, t).reshape(-1)
            cos, sin = rotary(x, position_ids[None])
            cos_cmp, sin_cmp = blocks.of_first_token(cos), blocks.of_first_token(sin)
            return cls(cos, sin, cos_cmp, sin_cmp, bounds, blocks, max_seqlen=max_seqlen)

        columns = torch.arange(t, device=x.device)
        counts, order = padding(attention_mask, b, t)
        if counts is None:
            cos, sin = rotary(x, columns[None] if position_ids is None else position_ids)
            return cls(cos, sin, first_tokens(cos, config), first_tokens(sin, config))
        if position_ids is None:
            position_ids = (columns + (counts - t)[:, None]).clamp(min=0)
        elif order is not None:
            position_ids = position_ids.expand(b, t).gather(1, order)
        cos, sin = rotary(x, position_ids.expand(b, t))
        layout = cls(cos, sin, cos, sin, counts=counts, order=order)
        cos_cmp, sin_cmp = (first_tokens(layout.to_the_left(y), config) for y in (cos, sin))
        return cls(cos, sin, cos_cmp, sin_cmp, counts=counts, order=order)

    def sort(self, x: Float[Tensor, "b t _"]) -> Tensor:
        """x as the attention takes it: padding in front; packed rows one after another."""
        if self.cu_seqlens is not None:
            return x.reshape(1, -1, x.shape[-1])
        return in_order(x, self.order)

    def unsort(self, y: Tensor, like: Float[Tensor, "b t _"]) -> Tensor:
        """The inverse of `sort`."""
        if self.cu_seqlens is not None:
            return y.reshape(like.shape)
        return out_of_order(y, self.order)

    def to_the_left(self, x: Float[Tensor, "b t *rest"]) -> Float[Tensor, "b t *rest"]:
        """Each row's tokens in front, as keys want them; what follows them nobody sees."""
        assert self.counts is not None
        t = x.shape[1]
        columns = (torch.arange(t, device=x.device) + (t - self.counts)[:, None]).clamp(max=t - 1)
        return x.gather(1, columns.reshape(*columns.shape, *[1] * (x.dim() - 2)).expand_as(x))

    def without_padding(self, out: Float[Tensor, "b t h e"]) -> Float[Tensor, "b t h e"]:
        """Zeros in the columns of padding."""
        if self.counts is None:
            return out
        t = out.shape[1]
        return out.masked_fill((torch.arange(t, device=out.device) < t - self.counts[:, None])[:, :, None, None], 0.0)


def first_tokens(x: Float[Tensor, "b t d"], config: NSAConfig) -> Float[Tensor, "b c d"]:
    """What x says of the first token of each compression block."""
    return x[:, :: config.compress_stride][:, : config.num_compressed_blocks(x.shape[1])]


def in_order(x: Float[Tensor, "b t _"], order: Int[Tensor, "b t"] | None) -> Float[Tensor, "b t _"]:
    """Columns as `order` sorts them."""
    return x if order is None else x.gather(1, order.unsqueeze(-1).expand_as(x))


def out_of_order(y: Float[Tensor, "b t _"], order: Int[Tensor, "b t"] | None) -> Float[Tensor, "b t _"]:
    """The inverse: columns back where they were."""
    return y if order is None else torch.empty_like(y).scatter(1, order.unsqueeze(-1).expand_as(y), y)


def padding(mask: Tensor | None, b: int, t: int) -> tuple[Tensor | None, Tensor | None]:
    """Tokens of each row, and the order that moves padding to the front; None where there is nothing to do.

    Outside of torch.compile the device is asked once whether there is any padding.
    """
    if mask is None:
        return None, None
    is_token = last_columns(mask, b, t)
    if not torch.compiler.is_compiling() and bool(is_token.all()):
        return None, None
    order = is_token.to(torch.int8).argsort(dim=1, stable=True)
    if not torch.compiler.is_compiling() and bool((order == torch.arange(t, device=mask.device)).all()):
        return is_token.sum(1, dtype=torch.int32), None
    return is_token.sum(1, dtype=torch.int32), order


def step_padding(mask: Tensor | None, b: int, t: int) -> tuple[Tensor | None, Tensor | None]:
    """Tokens of each row, and the order that moves padding to the front, without asking the device; None: no mask."""
    if mask is None:
        return None, None
    is_token = last_columns(mask, b, t)
    counts = is_token.sum(1, dtype=torch.int32)
    return counts, is_token.to(torch.int8).argsort(dim=1, stable=True) if t > 1 else None


def last_columns(mask: Tensor, b: int, t: int) -> Tensor:
    """Which of the last t columns are tokens."""
    if not isinstance(mask, Tensor):
        raise ValueError(f"attention_mask should be a tensor [b={b}, at least t={t}], got {type(mask).__name__}")
    if mask.dim() != 2 or mask.shape[0] != b or mask.shape[1] < t:
        raise ValueError(f"attention_mask should have shape [b={b}, at least t={t}], got {list(mask.shape)}")
    return mask[:, mask.shape[1] - t :] != 0


def _check(b: int, t: int, mask: Tensor | None, cu_seqlens: Tensor | None, position_ids: Tensor | None) -> None:
    if cu_seqlens is not None and mask is not None:
        raise ValueError("NativeSparseAttention: give cu_seqlens or an attention_mask, not both")
    if cu_seqlens is not None:
        check_lengths("cu_seqlens", cu_seqlens)
    if position_ids is not None and not isinstance(position_ids, Tensor):
        raise ValueError(f"position_ids should be a tensor [b={b} or 1, t={t}], got {type(position_ids).__name__}")
    if position_ids is not None and (position_ids.dim() != 2 or tuple(position_ids.shape) not in ((b, t), (1, t))):
        raise ValueError(f"position_ids should have shape [b={b} or 1, t={t}], got {list(position_ids.shape)}")
