"""The whole of `nsa.functional.native_sparse_attention` on kernels, forward and backward.

Done together, the branches' backward take the same d_out: their gates are folded into the log-sum-exps
(`rows.gates_backward`), so no gated copy of d_out is written, and the branches add into one dq.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nsa.config import NSAConfig
from nsa.kernels.contiguous_backward import contiguous_backward
from nsa.kernels.contiguous_forward import contiguous_forward
from nsa.kernels.launch import as_rows
from nsa.kernels.layout import Layout
from nsa.kernels.rows import combine, gates_backward, signed_by_gate
from nsa.kernels.selected_forward import selected_forward
from nsa.kernels.selected_gradients import selected_gradients
from nsa.kernels.selection import select_top_blocks
from nsa.shapes import Sequences
from nsa.streams import Branches


@dataclass(frozen=True)
class Layouts:
    """The same sequences over compressed, raw and window keys."""

    cmp: Layout
    slc: Layout
    win: Layout

    @staticmethod
    def of(q: Tensor, branches: Branches, max_keys: int = 0) -> "Layouts":
        """`max_keys`: a bound on the keys of the longest packed sequence; 0: none is known."""
        streams, where, s = branches, branches.slc.where, branches.slc.k.shape[1]
        slc = Layout(*q.shape[:2], s, 1, 1, *on_device(where, q.device), max_keys)
        cmp = replace(slc, block=streams.cmp.block, stride=streams.cmp.stride)
        if streams.win.k.shape[1] == s and streams.win.where is where:
            return Layouts(cmp, slc, slc)
        lengths = slc.seqlens_k if streams.win.where is where else on_device(streams.win.where, q.device)[2]
        return Layouts(cmp, slc, replace(slc, s=streams.win.k.shape[1], seqlens_k=lengths))


def on_device(where: Sequences, device: torch.device) -> list[Tensor | None]:
    lengths = (where.cu_seqlens_q, where.cu_seqlens_k, where.seqlens_k)
    return [None if x is None else x.to(device, torch.int32) for x in lengths]


@dataclass(frozen=True)
class Saved:
    """What backward needs besides the inputs."""

    outs: tuple[Tensor, Tensor, Tensor]
    lses: tuple[Tensor, Tensor, Tensor]
    block_indices: Tensor  # of no meaning where all blocks are selected

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return *self.outs, *self.lses, self.block_indices

    @staticmethod
    def of(tensors: Sequence[Tensor]) -> "Saved":
        return Saved(tuple(tensors[:3]), tuple(tensors[3:6]), tensors[6])


def selects_all(layout: Layout, config: NSAConfig) -> bool:
    """Whether no sequence is longer than n blocks: a query then selects all that it may see, and nothing is scored."""
    return layout.longest <= config.num_selected_blocks * config.select_block_size


Keys = tuple[Tensor, Tensor]
ThreeKeys = tuple[Keys, Keys, Keys]  # of cmp, slc, win


def pairs(keys: Sequence[Tensor]) -> ThreeKeys:
    """Keys and values of the three branches (cmp, slc, win), one after another, as the kernels read them."""
    k_cmp, v_cmp, k, v, k_win, v_win = map(as_rows, keys)
    return (k_cmp, v_cmp), (k, v), (k_win, v_win)


def attention_forward(
    q: Tensor, keys: ThreeKeys, gates: Tensor, layouts: Layouts, config: NSAConfig, scale: float
) -> tuple[Tensor, Saved]:
    (cmp, slc, win), q, gates = keys, as_rows(q), gates.contiguous()
    out_cmp, lse_cmp = contiguous_forward(q, *cmp, layouts.cmp, None, scale)
    if selects_all(layouts.slc, config):
        block_indices = q.new_empty(*q.shape[:2], slc[0].shape[2], config.num_selected_blocks, dtype=torch.int32)
        out_slc, lse_slc = contiguous_forward(q, *slc, layouts.slc, None, scale)
    else:
        block_indices = select_top_blocks(q, cmp[0], lse_cmp, layouts.cmp, config, scale)
        out_slc, lse_slc = selected_forward(q, *slc, block_indices, layouts.slc, config, scale)
    out_win, lse_win = contiguous_forward(q, *win, layouts.win, config.window_size, scale)
    out = combine(out_cmp, out_slc, out_win, gates)
    return out, Saved((out_cmp, out_slc, out_win), (lse_cmp, lse_slc, lse_win), block_indices)


def attention_backward(
    q: Tensor, keys: ThreeKeys, gates: Tensor, d_out: Tensor, saved: Saved,
    layouts: Layouts, config: NSAConfig, scale: float, nonnegative_gates: bool = True,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of q, of keys and values of cmp, slc, win, and of the gates.

    With gates that may be negative (`nonnegative_gates` False), the size of a gate goes into the log-sum-exp and its
    sign into a copy of d_out, one branch at a time.
    """
    (cmp, slc, win), q, gates, d_out = keys, as_rows(q), gates.contiguous(), d_out.contiguous()
    d_gates, deltas, lses = gates_backward(saved.outs, saved.lses, gates, d_out, nonnegative_gates)

    def of_branch(branch: int) -> tuple[Tensor, Tensor, Tensor]:
        signed = d_out if nonnegative_gates else signed_by_gate(d_out, gates, branch)
        return signed, lses[branch], deltas[branch]

    dq, *d_cmp = contiguous_backward(q, *cmp, *of_branch(0), layouts.cmp, None, scale)
    dq, *d_win = contiguous_backward(q, *win, *of_branch(2), layouts.win, config.window_size, scale, dq)
    if selects_all(layouts.slc, config):
        dq, *d_slc = contiguous_backward(q, *slc, *of_branch(1), layouts.slc, None, scale, dq)
    else:
        arguments = (*of_branch(1), layouts.slc, config, scale)
        dq, *d_slc = selected_gradients(q, *slc, saved.block_indices, *arguments, add_to=dq)
    return dq, *d_cmp, *d_slc, *d_win, d_gates
