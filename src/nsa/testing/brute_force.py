"""The paper's attentions in plain loops: what every op of this library is measured against.

One sequence, float64, no batch, no chunks, no tricks, and no code shared with `nsa.ops`, so that a bug there
cannot hide here. Read it beside the paper (arXiv:2502.11089): a function per equation, in the paper's order.

    tensors      q [t, h, d], k [s, g, d], v [s, g, e], out [t, h, e], lse [t, h] (natural log)
    positions    the queries are the last t of the s positions; a negative one is padding and sees nothing
    heads        query head i belongs to KV head i // (h // g)
    empty rows   a query that sees no key gets output 0 and lse -inf

The attentions are made of differentiable torch operations on single rows, so autograd through them gives the
true gradients too. Eqs. 8 to 11 are in `brute_force_selection`; batches are loops over these functions, see
`sequences`.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nsa.config import NSAConfig
from nsa.testing.brute_force_selection import (
    block_scores,
    compression_blocks,
    query_positions,
    select_blocks,
    visible_compressed,
)

Visible = Callable[[int, int, int], list[int]]
"""Which keys a query sees: (query's row, its position, its KV head) -> indices of keys, ascending."""


# ---- compression, eq. 7 --------------------------------------------------------------------------------


def compress(x: Float[Tensor, "s g d"], config: NSAConfig, phi: Callable[[Tensor], Tensor]) -> Float[Tensor, "c g d"]:
    """Eq. 7: phi of every block and head; phi maps [l, d] to [d]."""
    blocks = compression_blocks(x.shape[0], config)
    rows = [torch.stack([phi(x[block.start : block.stop, head]) for head in range(x.shape[1])]) for block in blocks]
    return torch.stack(rows) if rows else x.new_zeros(0, *x.shape[1:])


def phi_mean(block: Float[Tensor, "l d"]) -> Float[Tensor, " d"]:
    """The mean of the block's tokens."""
    total = torch.zeros_like(block[0])
    for row in range(block.shape[0]):
        total = total + block[row]
    return total / block.shape[0]


def phi_linear(block: Float[Tensor, "l d"], weight: Float[Tensor, "m ld"]) -> Float[Tensor, " m"]:
    """One linear map of all the block's numbers, the first token's first."""
    flat = torch.cat([block[row] for row in range(block.shape[0])])
    return torch.stack([(row * flat).sum() for row in weight])


def phi_mlp(
    block: Float[Tensor, "l d"],
    position_encoding: Float[Tensor, "l d"],
    weight_in: Float[Tensor, "m ld"],
    bias_in: Float[Tensor, " m"],
    weight_out: Float[Tensor, "d m"],
    bias_out: Float[Tensor, " d"],
) -> Float[Tensor, " d"]:
    """The mean, plus an MLP (one hidden layer, GELU) of the block with its intra-block position encoding."""
    hidden = phi_linear(block + position_encoding, weight_in) + bias_in
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return phi_mean(block) + torch.stack([(row * hidden).sum() for row in weight_out]) + bias_out


# ---- attention of one query, and of all ----------------------------------------------------------------


def attend(
    q: Float[Tensor, " d"], k: Float[Tensor, "n d"], v: Float[Tensor, "n e"], scale: float
) -> tuple[Float[Tensor, " e"], Float[Tensor, ""]]:
    """softmax(scale * q . k) v of one query over exactly these keys, and the log of the softmax's divisor."""
    if k.shape[0] == 0:
        return v.new_zeros(v.shape[1]), q.new_full((), -math.inf)
    logits = scale * (k @ q)
    lse = torch.logsumexp(logits, dim=0)
    return torch.exp(logits - lse) @ v, lse


def attention(
    q: Float[Tensor, "t h d"],
    k: Float[Tensor, "n g d"],
    v: Float[Tensor, "n g e"],
    positions: list[int],
    visible: Visible,
    scale: float | None = None,
) -> tuple[Float[Tensor, "t h e"], Float[Tensor, "t h"]]:
    """Each query over the keys that it sees; scale defaults to 1 / sqrt(d)."""
    scale = q.shape[2] ** -0.5 if scale is None else scale
    heads_per_group = q.shape[1] // k.shape[1]
    out, lse = [], []
    for row, position in enumerate(positions):
        for head in range(q.shape[1]):
            group = head // heads_per_group
            keys = visible(row, position, group)
            row_out, row_lse = attend(q[row, head], k[keys, group], v[keys, group], scale)
            out.append(row_out)
            lse.append(row_lse)
    if not out:
        return q.new_zeros(*q.shape[:2], v.shape[2]), q.new_zeros(q.shape[:2])
    return torch.stack(out).view(*q.shape[:2], v.shape[2]), torch.stack(lse).view(q.shape[:2])


# ---- the compressed branch -----------------------------------------------------------------------------


def compressed_attention(
    q: Float[Tensor, "t h d"],
    k_cmp: Float[Tensor, "c g d"],
    v_cmp: Float[Tensor, "c g e"],
    length: int,
    config: NSAConfig,
    scale: float | None = None,
) -> tuple[Float[Tensor, "t h e"], Float[Tensor, "t h"]]:
    """Attention over the compressed keys of a sequence of `length` tokens."""
    positions = query_positions(q.shape[0], length)
    return attention(
        q, k_cmp, v_cmp, positions, lambda _row, pos, _group: visible_compressed(pos, length, config), scale
    )


# ---- the selected branch, eq. 12, and the window -------------------------------------------------------


def visible_selected(position: int, length: int, blocks: list[int], config: NSAConfig) -> list[int]:
    """All tokens of the selected blocks that are not after the query."""
    return [key for key in range(length) if key <= position and key // config.select_block_size in blocks]


def selected_attention(
    q: Float[Tensor, "t h d"],
    k: Float[Tensor, "s g d"],
    v: Float[Tensor, "s g e"],
    block_indices: Int[Tensor, "t g n"],
    config: NSAConfig,
    scale: float | None = None,
) -> tuple[Float[Tensor, "t h e"], Float[Tensor, "t h"]]:
    """Eq. 12: attention over the raw keys of the selected blocks."""
    length = k.shape[0]
    picks = block_indices.tolist()
    positions = query_positions(q.shape[0], length)
    return attention(
        q,
        k,
        v,
        positions,
        lambda row, pos, group: visible_selected(pos, length, picks[row][group], config),
        scale,
    )


def visible_window(position: int, length: int, window_size: int) -> list[int]:
    """The w keys at positions (t - w, t], the query's own included."""
    return [key for key in range(length) if position - window_size < key <= position]


def window_attention(
    q: Float[Tensor, "t h d"],
    k: Float[Tensor, "s g d"],
    v: Float[Tensor, "s g e"],
    window_size: int,
    scale: float | None = None,
) -> tuple[Float[Tensor, "t h e"], Float[Tensor, "t h"]]:
    """Attention over the last `window_size` keys."""
    length = k.shape[0]
    positions = query_positions(q.shape[0], length)
    return attention(q, k, v, positions, lambda _row, pos, _group: visible_window(pos, length, window_size), scale)


def dense_attention(
    q: Float[Tensor, "t h d"],
    k: Float[Tensor, "s g d"],
    v: Float[Tensor, "s g e"],
    scale: float | None = None,
) -> tuple[Float[Tensor, "t h e"], Float[Tensor, "t h"]]:
    """Ordinary causal attention, which the sparse branches become when they see everything."""
    positions = query_positions(q.shape[0], k.shape[0])
    return attention(q, k, v, positions, lambda _row, pos, _group: list(range(pos + 1)), scale)


# ---- the layer, eq. 5 ----------------------------------------------------------------------------------


def combine(
    out_cmp: Float[Tensor, "t h e"],
    out_slc: Float[Tensor, "t h e"],
    out_win: Float[Tensor, "t h e"],
    gates: Float[Tensor, "t h 3"],
) -> Float[Tensor, "t h e"]:
    """Eq. 5: the gated sum; one gate a query, head and branch, in the order cmp, slc, win."""
    out = torch.zeros_like(out_cmp)
    for branch, branch_out in enumerate((out_cmp, out_slc, out_win)):
        out = out + gates[..., branch, None] * branch_out
    return out


def native_sparse_attention(
    q: Float[Tensor, "t h d"],
    k: Float[Tensor, "s g d"],
    v: Float[Tensor, "s g e"],
    gates: Float[Tensor, "t h 3"],
    config: NSAConfig,
    *,
    k_cmp: Float[Tensor, "c g d"] | None = None,
    v_cmp: Float[Tensor, "c g e"] | None = None,
    k_win: Float[Tensor, "s g d"] | None = None,
    v_win: Float[Tensor, "s g e"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "t h e"]:
    """The whole of the paper's section 3; k_cmp, v_cmp default to block means, k_win, v_win to k, v."""
    length = k.shape[0]
    k_cmp = compress(k, config, phi_mean) if k_cmp is None else k_cmp
    v_cmp = compress(v, config, phi_mean) if v_cmp is None else v_cmp
    k_win = k if k_win is None else k_win
    v_win = v if v_win is None else v_win
    out_cmp, _ = compressed_attention(q, k_cmp, v_cmp, length, config, scale)
    block_indices = select_blocks(block_scores(q, k_cmp, length, config, scale), length, config)
    out_slc, _ = selected_attention(q, k, v, block_indices, config, scale)
    out_win, _ = window_attention(q, k_win, v_win, config.window_size, scale)
    return combine(out_cmp, out_slc, out_win, gates)
