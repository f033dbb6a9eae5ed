"""Attention of a few tokens a row over block tables, all of them at once: a decoding step, in PyTorch or on kernels.

Of the selection branch only what a query selects is read, so that a step's work does not grow with l', as the paper
has it: s/d + n l' + w keys a query.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nsa.cache_tensors import CacheTensors
from nsa.decoding import MAX_QUERIES
from nsa.ops.selection import sum_into_blocks, top_blocks
from nsa.ops.tiles import accumulation_dtype
from nsa.serving.blocks import LayerBlocks, slots
from nsa.serving.step import Step

# Numbers of keys and values that are gathered at a time, at most (for one query however many it has).
GATHERED = 1 << 24


def attend_few(
    q: Float[Tensor, "n h d"],
    gates: Float[Tensor, "n h 3"],
    memory: LayerBlocks,
    step: Step,
    rows: Int[Tensor, " n"],
    positions: Int[Tensor, " n"],
    *,
    scale: float | None = None,
) -> Float[Tensor, "n h e"]:
    """`nsa.native_sparse_attention` of queries at `positions` of `rows`, each by itself.

    Returns:
        [n, h, e] in q's dtype. A branch in which a query sees no key adds 0.

    Source: paper eqs. 5 and 8 to 12. Tested against the fp64 brute force of nsa.testing.
    """
    out = q.new_empty(*q.shape[:2], memory.v.shape[-1])
    if not len(q):
        return out
    config, width = step.config, memory.k.shape[2] * (memory.k.shape[3] + memory.v.shape[3])
    # By length, so that those which are gathered together have about as many compressed keys.
    order = positions.argsort(stable=True)
    keys = max(
        (int(positions[order[-1]]) + 1) // config.compress_stride, config.num_selected_blocks * config.select_block_size
    )
    for some in order.split(max(1, GATHERED // (keys * width))):
        out[some] = _attend(q[some], gates[some], memory, step, rows[some], positions[some], scale)
    return out


def on_kernels(
    q: Float[Tensor, "n h d"],
    gates: Float[Tensor, "n h 3"],
    memory: LayerBlocks,
    step: Step,
    rows: Int[Tensor, " n"],
    positions: Int[Tensor, " n"],
    *,
    scale: float | None = None,
) -> Float[Tensor, "n h e"]:
    """The same on the decoding kernels, each query a row of a paged cache whose window is in pages too."""
    from nsa.kernels.decode import decode_attention  # only where triton is installed

    table, table_win = step.tables_without_null
    tensors = CacheTensors(
        memory.k, memory.v, memory.k_cmp, memory.v_cmp, memory.k_win, memory.v_win, memory.k_raw, memory.v_raw,
        table[rows], (positions + 1).int(),
        torch.zeros(len(q), memory.k.shape[2], MAX_QUERIES, dtype=torch.int32, device=q.device),
        None if table_win is None else table_win[rows],
    )  # fmt: skip
    return decode_attention(q[:, None], gates[:, None], tensors, step.config, scale=scale)[:, 0]


def _attend(
    q: Tensor, gates: Tensor, memory: LayerBlocks, step: Step, row: Tensor, position: Tensor, scale: float | None
) -> Tensor:
    """Queries in the order of their positions."""
    config, g, device = step.config, memory.k.shape[2], q.device
    wide = accumulation_dtype(q.dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q_wide = q.to(wide).unflatten(1, (g, -1)) * scale
    row, group = row[:, None], torch.arange(g, device=device)[:, None]

    first = config.compress_block_size // config.compress_stride - 1
    stride = torch.arange(first, max(first, (int(position[-1]) + 1) // config.compress_stride), device=device)
    seen = stride < (position[:, None] + 1) // config.compress_stride
    slot = slots(step.table, row, stride, step.size // config.compress_stride)
    out_cmp, p = _branch(q_wide, memory.k_cmp, memory.v_cmp, slot[:, None], seen[:, None], group)

    chosen = top_blocks(sum_into_blocks(p.sum(2), config).transpose(0, 1), position, config).transpose(0, 1).long()
    token = chosen[..., None] * config.select_block_size + torch.arange(config.select_block_size, device=device)
    seen = ((chosen[..., None] >= 0) & (token <= position[:, None, None, None])).flatten(2)
    slot = slots(step.table, row[:, None], token.flatten(2), step.size)
    out_slc, _ = _branch(q_wide, memory.k, memory.v, slot, seen, group)

    token = position[:, None] - torch.arange(config.window_size - 1, -1, -1, device=device)
    k_win, v_win, table = memory.window(step.table, step.table_win)
    slot = slots(table, row, token, step.size)
    out_win, _ = _branch(q_wide, k_win, v_win, slot[:, None], (token >= 0)[:, None], group)

    gate_cmp, gate_slc, gate_win = gates.to(wide).unflatten(1, (g, -1)).unsqueeze(-1).unbind(-2)
    return (gate_cmp * out_cmp + gate_slc * out_slc + gate_win * out_win).flatten(1, 2).to(q.dtype)


def _branch(
    q: Float[Tensor, "n g r d"],
    k: Float[Tensor, "blocks size g d"],
    v: Float[Tensor, "blocks size g e"],
    slot: Int[Tensor, "n _ m"],
    seen: Bool[Tensor, "n _ m"],
    group: Int[Tensor, "g 1"],
) -> tuple[Float[Tensor, "n g r e"], Float[Tensor, "n g r m"]]:
    """Attention over the keys in these places, and the probabilities; 0 where a query sees none."""
    seen = (seen & (slot >= 0)).unsqueeze(2)
    slot = slot.clamp(min=0)
    block, place = slot // k.shape[1], slot % k.shape[1]
    keys, values = k[block, place, group].to(q.dtype), v[block, place, group].to(q.dtype)  # [n, g, m, .]
    scores = (q @ keys.mT).masked_fill(~seen, -torch.inf)
    top = scores.amax(-1, keepdim=True) if scores.shape[-1] else scores.new_zeros(*scores.shape[:-1], 1)
    p = (scores - top.masked_fill(top == -torch.inf, 0.0)).exp()
    total = p.sum(-1, keepdim=True)
    p = p / total.masked_fill(total == 0, 1.0)
    return p @ values.masked_fill(~seen.squeeze(2).unsqueeze(-1), 0.0), p
