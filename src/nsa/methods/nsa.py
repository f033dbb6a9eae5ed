"""Native Sparse Attention (arXiv:2502.11089, section 3): three branches, added by their gates."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa.composed import as_operator, is_traced
from nsa.config import NSAConfig
from nsa.methods.oracle import is_by_mass
from nsa.ops.attend import attend
from nsa.ops.causal_attention import causal_attention, sees_all
from nsa.ops.combine import combine
from nsa.ops.selection import attend_and_select, top_blocks
from nsa.ops.tiles import accumulation_dtype
from nsa.streams import Blocks, Branches, Causal, Stream, Window

SCORES = 2**26  # of an oracle's queries with all keys, at once


def compose(
    q: Tensor, branches: Branches, gates: Tensor, config: NSAConfig, scale: float,
    on: Literal["torch", "triton"] = "torch",
) -> Tensor:  # fmt: skip
    """The steps of the paper by the PyTorch operations; `on` the kernels only for an oracle's branches."""
    cmp, slc, win = branches
    selects_all = sees_all(q, slc, config.num_selected_blocks * config.select_block_size)
    if selects_all:
        out_cmp, _ = attend(q, cmp, Causal(), scale=scale, backend=on)
        out_slc = causal_attention(q, slc.k, slc.v, scale=scale)
    else:
        if is_by_mass():
            out_cmp, _ = attend(q, cmp, Causal(), scale=scale, backend=on)
            indices = blocks_by_mass(q, slc, config, scale)
        else:
            out_cmp, _, indices = attend_and_select(q, cmp, config, scale=scale)
        blocks = Blocks(indices, config.select_block_size, config.num_local_blocks)
        out_slc, _ = attend(q, slc, blocks, scale=scale, backend=on)
    if not sees_all(q, win, config.window_size):
        out_win, _ = attend(q, win, Window(config.window_size), scale=scale, backend=on)
    elif selects_all and win.k is slc.k and win.v is slc.v:
        out_win = out_slc
    else:
        out_win = causal_attention(q, win.k, win.v, scale=scale)
    return combine(out_cmp, out_slc, out_win, gates)


def blocks_by_mass(q: Tensor, slc: Stream, config: NSAConfig, scale: float) -> Tensor:
    """Eqs. 9 to 11 with the probabilities of the raw keys themselves: blocks of one token are not compressed."""
    if slc.where.is_uniform and q.numel() and not is_traced(q):
        return _blocks_by_mass_of_rows(q, slc.k, config, scale)
    tokens = replace(config, compress_block_size=1, compress_stride=1)
    return attend_and_select(q, slc._replace(v=slc.v[..., :0]), tokens, scale=scale)[2]


def _blocks_by_mass_of_rows(q: Tensor, k: Tensor, config: NSAConfig, scale: float) -> Tensor:
    """The same of whole rows, many queries at once: a tile of tokens holds few."""
    (b, t, h, _), (_, s, g, _) = q.shape, k.shape
    blocks, keys = config.num_selection_blocks(s), torch.arange(s, device=q.device)
    wide = q.view(b, t, g, h // g, -1).permute(0, 2, 3, 1, 4).to(accumulation_dtype(q.dtype)) * scale
    found: list[Tensor] = []
    for part in wide.split(max(1, SCORES // (b * h * s)), dim=3):
        positions = s - t + sum(x.shape[2] for x in found) + torch.arange(part.shape[3], device=q.device)
        scores = part @ k.permute(0, 2, 3, 1).unsqueeze(2).to(part.dtype)
        p = scores.masked_fill(keys > positions[:, None], -torch.inf).softmax(-1).sum(2)
        mass = F.pad(p, (0, blocks * config.select_block_size - s)).unflatten(-1, (blocks, -1)).sum(-1)
        found.append(top_blocks(mass, positions, config))
    return torch.cat(found, dim=2).transpose(1, 2)


# ---- what takes over ----------------------------------------------------------------------------------------


def attention(
    q: Tensor, branches: Branches, gates: Tensor, config: NSAConfig, scale: float, *,
    on: Literal["torch", "triton"], nonnegative_gates: bool, max_seqlen_k: int | None,
) -> Tensor:  # fmt: skip
    """`nsa.functional.native_sparse_attention` of streams, all of it checked and filled in."""
    if on == "triton" and not is_by_mass():
        from nsa.kernels.functional import native_sparse_attention as on_kernels  # only where triton is installed

        return on_kernels(q, branches, gates, config, scale, nonnegative_gates, max_seqlen_k)
    if is_traced(q):
        return composed_attention([q, *branches.tensors, gates], branches.lengths, config.sizes, scale)
    return compose(q, branches, gates, config, scale, on)


def _compose(tensors: Sequence[Tensor], lengths: Sequence[Tensor | None], sizes: list[int], scale: float) -> Tensor:
    q, *keys, gates = tensors
    config = NSAConfig.from_sizes(sizes)
    return compose(q, Branches.of(config, keys, lengths), gates, config, scale)


composed_attention = as_operator("composed_attention", _compose)
