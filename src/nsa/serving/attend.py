"""Attention of a step's tokens over a layer's blocks: rows with few new ones together, chunks of prefill one by one."""

import torch
from jaxtyping import Float
from torch import Tensor

from nsa.backend import resolve
from nsa.functional import native_sparse_attention
from nsa.serving import attend_few
from nsa.serving.blocks import LayerBlocks, read, slots
from nsa.serving.step import Step

# Rows with more new tokens are chunks of prefill: their queries share most of the keys that they read.
MAX_FEW = 16


@torch.no_grad()
def attend(
    q: Float[Tensor, "tokens h d"],
    gates: Float[Tensor, "tokens h 3"],
    memory: LayerBlocks,
    step: Step,
    *,
    scale: float | None = None,
) -> Float[Tensor, "tokens h e"]:
    """`nsa.native_sparse_attention` of every new token over its row's tokens, itself included.

    Args:
        q: rotated queries of the packed tokens; those behind `step.num_tokens` are padding.
        gates: one scalar per query, head and branch, in the order cmp, slc, win.
        memory: the layer's blocks, the new tokens included (`nsa.serving.append`).
        step: rows and tables.
        scale: factor of the scores, d ** -0.5 by default.

    Returns:
        [tokens, h, e] in q's dtype, 0 for padding. A branch in which a query sees no key adds 0.

    A chunk of prefill has its row's keys and values gathered for its own time, in the memory that one row of a layer
    takes; rows with few new tokens only what they select.
    """
    out = q.new_zeros(*q.shape[:2], memory.v.shape[-1])
    few: list[int] = []
    for row, count in enumerate(step.counts):
        if count > MAX_FEW:
            tokens = slice(step.starts[row], step.starts[row] + count)
            out[tokens] = _chunk(q[tokens], gates[tokens], memory, step, row, scale)
        else:
            few += range(step.starts[row], step.starts[row] + count)
    if not few:
        return out
    on_kernels = resolve(q[:, None], memory.k, memory.v, memory.k_cmp, memory.v_cmp, scale=scale) == "triton"
    attend_them = attend_few.on_kernels if on_kernels else attend_few.attend_few
    if len(few) == len(q):
        return attend_them(q, gates, memory, step, step.rows, step.positions, scale=scale)
    index = torch.tensor(few, device=q.device)
    out[index] = attend_them(q[index], gates[index], memory, step, step.rows[index], step.positions[index], scale=scale)
    return out


def _chunk(
    q: Float[Tensor, "t h d"], gates: Float[Tensor, "t h 3"], memory: LayerBlocks, step: Step, row: int,
    scale: float | None,
) -> Float[Tensor, "t h e"]:  # fmt: skip
    """One row's new tokens, whose queries are the last t of its positions."""
    config, length = step.config, step.lengths[row]
    number, places = torch.tensor(row, device=q.device), torch.arange(length, device=q.device)
    token = slots(step.table, number, places, step.size)
    first = config.compress_block_size // config.compress_stride - 1
    blocks = first + torch.arange(config.num_compressed_blocks(length), device=q.device)
    block = slots(step.table, number, blocks, step.size // config.compress_stride)
    k_win, v_win, table = memory.window(step.table, step.table_win)
    near = slots(table, number, places[max(0, length - len(q) - config.window_size + 1) :], step.size)
    return native_sparse_attention(
        q[None], read(memory.k, token)[None], read(memory.v, token)[None], gates[None], config,
        k_cmp=read(memory.k_cmp, block)[None], v_cmp=read(memory.v_cmp, block)[None],
        k_win=read(k_win, near)[None], v_win=read(v_win, near)[None], scale=scale, nonnegative_gates=True,
    )[0]  # fmt: skip
