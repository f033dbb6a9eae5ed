"""The whole of `nsa.functional.native_sparse_attention` on kernels, forward and backward.

Done together, the branches' backward take the same d_out: their gates are folded into the log-sum-exps
(`rows.gates_backward`), so no gated copy of d_out is written, and the branches add into one dq.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

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


@dataclass(frozen=True)
class Layouts:
    """The same sequences over compressed, raw and window keys."""

    cmp: Layout
    slc: Layout
    win: Layout

    @staticmethod
    def of(
        q: Tensor, k: Tensor, k_win: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, lengths: Tensor | None,
        lengths_win: Tensor | None, config: NSAConfig, max_keys: int = 0,
    ) -> "Layouts":  # fmt: skip
        b, t = q.shape[:2]
        slc = Layout(b, t, k.shape[1], 1, 1, cu_q, cu_k, lengths, max_keys)
        cmp = replace(slc, block=config.compress_block_size, stride=config.compress_stride)
        if k_win.shape[1] == k.shape[1] and lengths_win is lengths:
            return Layouts(cmp, slc, slc)
        return Layouts(cmp, slc, replace(slc, s=k_win.shape[1], seqlens_k=lengths_win))


@dataclass(frozen=True)
class Saved:
    """What backward needs besides the inputs."""

    outs: tuple[Tensor, Tensor, Tensor]
    lses: tuple[Tensor, Tensor, Tensor]
    block_indices: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return *self.outs, *self.lses, self.block_indices

    @staticmethod
    def of(tensors: Sequence[Tensor]) -> "Saved":
        return Saved(tuple(tensors[:3]), tuple(tensors[3:6]), tensors[6])


Keys = tuple[Tensor, Tensor]


def pairs(keys: Sequence[Tensor]) -> tuple[Keys, Keys, Keys]:
    """Keys and values of the three branches (cmp, slc, win), one after another, as the kernels read them."""
    k_cmp, v_cmp, k, v, k_win, v_win = map(as_rows, keys)
    return (k_cmp, v_cmp), (k, v), (k_win, v_win)


def attention_forward(
    q: Tensor, cmp: Keys, slc: Keys, win: Keys, gates: Tensor, layouts: Layouts, config: NSAConfig, scale: float
) -> tuple[Tensor, Saved]:
    q, gates = as_rows(q), gates.contiguous()
    out_cmp, lse_cmp = contiguous_forward(q, *cmp, layouts.cmp, None, scale)
    block_indices = select_top_blocks(q, cmp[0], lse_cmp, layouts.cmp, config, scale)
    out_slc, lse_slc = selected_forward(q, *slc, block_indices, layouts.slc, config, scale)
    out_win, lse_win = contiguous_forward(q, *win, layouts.win, config.window_size, scale)
    out = combine(out_cmp, out_slc, out_win, gates)
    return out, Saved((out_cmp, out_slc, out_win), (lse_cmp, lse_slc, lse_win), block_indices)


def attention_backward(
    q: Tensor, cmp: Keys, slc: Keys, win: Keys, gates: Tensor, d_out: Tensor, saved: Saved,
    layouts: Layouts, config: NSAConfig, scale: float, nonnegative_gates: bool = True,
) -> tuple[Tensor, Keys, Keys, Keys, Tensor]:  # fmt: skip
    """Gradients of q, of the three pairs of keys and values, and of the gates.

    With gates that may be negative (`nonnegative_gates` False), the size of a gate goes into the log-sum-exp and its
    sign into a copy of d_out, one branch at a time.
    """
    q, gates, d_out = as_rows(q), gates.contiguous(), d_out.contiguous()
    d_gates, deltas, lses = gates_backward(saved.outs, saved.lses, gates, d_out, nonnegative_gates)

    def of_branch(branch: int) -> tuple[Tensor, Tensor, Tensor]:
        signed = d_out if nonnegative_gates else signed_by_gate(d_out, gates, branch)
        return signed, lses[branch], deltas[branch]

    dq, *d_cmp = contiguous_backward(q, *cmp, *of_branch(0), layouts.cmp, None, scale)
    dq, *d_win = contiguous_backward(q, *win, *of_branch(2), layouts.win, config.window_size, scale, dq)
    arguments = (*of_branch(1), layouts.slc, config, scale)
    dq, *d_slc = selected_gradients(q, *slc, saved.block_indices, *arguments, add_to=dq)
    return dq, tuple(d_cmp), tuple(d_slc), tuple(d_win), d_gates
