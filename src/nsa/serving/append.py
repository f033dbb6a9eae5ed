"""New tokens into a layer's blocks, and the compression blocks that they complete."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from nsa.ops.compress import Phi
from nsa.ops.rotary import rotated
from nsa.serving.blocks import LayerBlocks, read, write
from nsa.serving.step import Step


@torch.no_grad()
def append(
    memory: LayerBlocks,
    step: Step,
    new: Sequence[Float[Tensor, "tokens g _"]],
    phi: tuple[Phi, Phi],
    cos_cmp: Float[Tensor, "completed d"],
    sin_cmp: Float[Tensor, "completed d"],
) -> None:
    """Write the step's tokens where its tables say, then compress the blocks that they complete.

        k_cmp[i] = rotate(phi_k(k_raw[i d : i d + l]), position i d),   v_cmp[i] = phi_v(v_raw[i d : i d + l])

    What has no place (null block, past the table) is not written. A token that comes a second time, after the row
    was taken back to before it, goes over the first, and so do the blocks that it completes.

    Args:
        memory: the layer's blocks, written in place.
        step: rows and tables; `step.num_tokens` tokens of the packed ones count, those behind them are padding.
        new: k, v, k_win, v_win, k_raw, v_raw of them; keys rotated, but for k_raw. Where keys and values are shared
            nobody reads those of the window.
        phi: of keys and of values, from blocks [..., l, d] to [..., d].
        cos_cmp, sin_cmp: rotary factors of `step.block_positions`.
    """
    k, v, k_win, v_win, k_raw, v_raw = (x[: step.num_tokens] for x in new)
    write(memory.k, step.token_slots, k)
    write(memory.v, step.token_slots, v)
    if memory.k_win is not None and memory.v_win is not None:
        write(memory.k_win, step.window_slots, k_win)
        write(memory.v_win, step.window_slots, v_win)
    write(memory.k_raw, step.raw_slots, k_raw)
    write(memory.v_raw, step.raw_slots, v_raw)
    if len(step.empty_slots):
        # Kernels load them and give them no weight, but what another row left there may be NaN.
        for x in (memory.k_cmp, memory.v_cmp):
            write(x, step.empty_slots, x.new_zeros(len(step.empty_slots), *x.shape[2:]))
    if not len(step.compressed_slots):
        return
    blocks_k, blocks_v = (read(x, step.block_slots).transpose(1, 2) for x in (memory.k_raw, memory.v_raw))
    write(memory.k_cmp, step.compressed_slots, rotated(phi[0](blocks_k), cos_cmp, sin_cmp))
    write(memory.v_cmp, step.compressed_slots, phi[1](blocks_v))
