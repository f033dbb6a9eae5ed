"""InfLLM-V2's step over block tables: every row's keys and values are gathered for its own time."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nsa.config import InfLLMv2Config
from nsa.methods.infllm_v2 import infllm_v2_attention
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
    config: InfLLMv2Config,
) -> Float[Tensor, "tokens h e"]:
    """`nsa.infllm_v2_attention` of new tokens, written to their blocks first, over their rows' tokens.

    Pooled keys are the means of keys that lie in the blocks, and are made again in every step, so that one cache is all
    that there is: a step reads all keys of its rows, as dense attention does, and attends to those that are chosen.

    Args:
        q, k, v: rotated queries and keys, and values, of the packed tokens, row after row; what is behind the last of
            `starts` is padding.
        memory: keys and values of the layer's blocks, written in place.
        table: block tables; 0 is the engine's null block, which is never written.
        starts: where each row's new tokens begin among the packed ones, and where the last ones end.
        lengths: tokens of each row, the new ones included.
        config: block sizes and counts.

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
        out[new] = infllm_v2_attention(q[new][None], keys, values, config)[0]
    return out
