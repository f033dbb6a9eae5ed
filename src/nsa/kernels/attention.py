"""The whole of `nsa.functional.native_sparse_attention` on kernels, forward and backward.

Done together, the branches' backward take the same d_out: their gates are folded into the log-sum-exps
(`rows.gates_backward`), so no gated copy of d_out is written, and the branches add into one dq.
"""

from dataclasses import dataclass

from torch import Tensor

from nsa.config import NSAConfig
from nsa.kernels.contiguous_backward import contiguous_backward
from nsa.kernels.contiguous_forward import contiguous_forward
from nsa.kernels.layout import Layout
from nsa.kernels.rows import combine, gates_backward
from nsa.kernels.selected_backward import selected_dkdv
from nsa.kernels.selected_forward import selected_dq, selected_forward
from nsa.kernels.selection import select_top_blocks


@dataclass(frozen=True)
class Layouts:
    """The same sequences over compressed, raw and window keys."""

    cmp: Layout
    slc: Layout
    win: Layout


@dataclass(frozen=True)
class Saved:
    """What backward needs besides the inputs."""

    outs: tuple[Tensor, Tensor, Tensor]
    lses: tuple[Tensor, Tensor, Tensor]
    block_indices: Tensor


Keys = tuple[Tensor, Tensor]


def attention_forward(
    q: Tensor, cmp: Keys, slc: Keys, win: Keys, gates: Tensor, layouts: Layouts, config: NSAConfig, scale: float
) -> tuple[Tensor, Saved]:
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
    deltas, lses = gates_backward(saved.outs, saved.lses, gates if nonnegative_gates else gates.abs(), d_out)
    d_gates = deltas.movedim(0, -1).to(gates.dtype).contiguous()
    if not nonnegative_gates:
        deltas = (deltas * gates.sign().movedim(-1, 0)).contiguous()

    def of_branch(branch: int) -> tuple[Tensor, Tensor, Tensor]:
        signed = d_out if nonnegative_gates else d_out * gates[..., branch, None].sign().to(d_out.dtype)
        return signed, lses[branch], deltas[branch]

    dq, *d_cmp = contiguous_backward(q, *cmp, *of_branch(0), layouts.cmp, None, scale)
    dq, *d_win = contiguous_backward(q, *win, *of_branch(2), layouts.win, config.window_size, scale, dq)
    arguments = (*of_branch(1), layouts.slc, config, scale)
    dq = selected_dq(q, *slc, saved.block_indices, *arguments, add_to=dq)
    d_slc = selected_dkdv(q, *slc, saved.block_indices, *arguments)
    return dq, tuple(d_cmp), d_slc, tuple(d_win), d_gates
