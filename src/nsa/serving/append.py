"""New tokens into a layer's blocks, and the compression blocks that they complete."""

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
    k: Float[Tensor, "tokens g d"],
    v: Float[Tensor, "tokens g e"],
    k_win: Float[Tensor, "tokens g d"] | None,
    v_win: Float[Tensor, "tokens g e"] | None,
    k_raw: Float[Tensor, "tokens g d"],
    v_raw: Float[Tensor, "tokens g e"],
    compress_k: Phi,
    compress_v: Phi,
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
        k, v: rotated keys, and values, of the selection branch, and of the window where k_win is None (shared).
        k_win, v_win: those of the window branch.
        k_raw, v_raw: those of compression, not rotated.
        compress_k, compress_v: phi, from blocks [..., l, d] to [..., d].
        cos_cmp, sin_cmp: rotary factors of `step.block_positions`.
    """
    n = step.num_tokens
    write(memory.k, step.token_slots, k[:n])
    write(memory.v, step.token_slots, v[:n])
    if memory.k_win is not None and memory.v_win is not None:
        if k_win is None or v_win is None:
            raise ValueError("append: the window has its own keys and values, and was given none")
        write(memory.k_win, step.window_slots, k_win[:n])
        write(memory.v_win, step.window_slots, v_win[:n])
    write(memory.k_raw, step.raw_slots, k_raw[:n])
    write(memory.v_raw, step.raw_slots, v_raw[:n])
    if len(step.empty_slots):
        # Kernels load them and give them no weight, but what another row left there may be NaN.
        for x in (memory.k_cmp, memory.v_cmp):
            write(x, step.empty_slots, x.new_zeros(len(step.empty_slots), *x.shape[2:]))
    if not len(step.compressed_slots):
        return
    blocks_k, blocks_v = (read(x, step.block_slots).transpose(1, 2) for x in (memory.k_raw, memory.v_raw))
    write(memory.k_cmp, step.compressed_slots, rotated(compress_k(blocks_k), cos_cmp, sin_cmp))
    write(memory.v_cmp, step.compressed_slots, compress_v(blocks_v))
