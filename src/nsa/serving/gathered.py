"""A step over block tables for which a row's keys and values are gathered for its time: InfLLM-V2, dense layers."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nsa.serving.blocks import read, slots, write


@torch.no_grad()
def append_and_attend(
    q: Float[Tensor, "tokens h d"],
    k: Float[Tensor, "tokens g d"],
    v: Float[Tensor, "tokens g e"],
    memory: tuple[Float[Tensor, "blocks size g d"], Float[Tensor, "blocks size g e"]],
    table: Int[Tensor, "rows n"],
    starts: Sequence[int],
    lengths: Sequence[int],
    attention: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Float[Tensor, "tokens h e"]:
    """`attention` of new tokens, written to their blocks first, over their rows' tokens.

    One cache is all that there is: a step reads all keys of its rows, whatever the method then attends to.

    Args:
        q, k, v: rotated queries and keys, and values, of the packed tokens, row after row; what is behind the last of
            `starts` is padding.
        memory: keys and values of the layer's blocks, written in place.
        table: block tables; 0 is the engine's null block, which is never written.
        starts: where each row's new tokens begin among the packed ones, and where the last ones end.
        lengths: tokens of each row, the new ones included.
        attention: of q [1, t, h, d], k [1, s, g, d] and v [1, s, g, e], queries being the last t of s positions.

    Returns:
        [tokens, h, e] in q's dtype, 0 for padding.
    """
    out = q.new_zeros(*q.shape[:2], v.shape[-1])
    size = memory[0].shape[1]
    for row, length in enumerate(lengths):
        new = slice(starts[row], starts[row + 1])
        if new.start == new.stop:
            continue
        place = slots(table, torch.tensor(row, device=q.device), torch.arange(length, device=q.device), size)
        for x, to in zip((k, v), memory, strict=True):
            write(to, place[length - (new.stop - new.start) :], x[new])
        keys, values = (read(x, place)[None] for x in memory)
        out[new] = attention(q[new][None], keys, values)[0]
    return out
