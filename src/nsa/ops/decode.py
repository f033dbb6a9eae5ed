"""Decoding over the fixed memory of a cache: append new tokens, and attend from the last ones.

What the kernels of `nsa.kernels.decode_*` do, in PyTorch: `nsa.cache_tensors` says where everything lies. Here the
lengths are read by the host and keys are gathered; the kernels do neither.
"""

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from nsa.cache_tensors import CacheTensors
from nsa.config import NSAConfig
from nsa.decode_step import DecodeStep
from nsa.ops.attend import attend
from nsa.ops.combine import combine
from nsa.ops.compress import PHI
from nsa.ops.rotary import rotated
from nsa.ops.selection import attend_and_select
from nsa.streams import Blocks, Branches, Window


@torch.no_grad()
def append_tokens(
    tensors: CacheTensors,
    new: Branches,
    config: NSAConfig,
    phi: tuple[tuple[Tensor, ...], tuple[Tensor, ...]],
    step: DecodeStep,
) -> None:
    """Write new tokens behind those of each row, compress the blocks that they complete, and advance the lengths.

    Block i ends with stride c = i + l/d - 1. A row of `length` tokens that gets up to t more completes at most
    ceil(t/d) strides, from c = length // d on; those of them that are whole end a block:

        k_cmp[i] = rotate(phi_k(k_raw[i d : i d + l]), position i d),   v_cmp[i] = phi_v(v_raw[i d : i d + l])

    Args:
        tensors: the cache of a layer, written in place.
        new: [b, t, g, .], raw keys and values of the tokens, for each branch; of cmp not rotated. That of the window is
            not read where keys and values are shared.
        config: block sizes, and the kind of phi.
        phi: its weights for keys and for values, as `nsa.ops.compress` takes them: none for the mean, (weight,) for
            linear, (position_encoding, weight_in, bias_in, weight_out, bias_out) for mlp.
        step: which columns are tokens (0 in a row leaves it as it was), and rotary factors.

    Raises:
        ValueError: shapes or dtypes that do not fit, or tokens without room: past the block table, in a page that is
            not there, or more at a time than the rings keep beside what the first of them reads. Nothing changes.
    """
    tensors.check_tokens(config, new, step)
    k_raw, v_raw, k, v, k_win, v_win = new.tensors
    t, counts = k.shape[1], step.counts
    before = tensors.lengths.long()
    count = torch.full_like(before, t) if counts is None else counts.long()
    column = torch.arange(t, device=k.device)
    row, at = (column >= t - count[:, None]).nonzero(as_tuple=True)
    position = (before - t + count)[row] + at
    page, place = _page_and_place(tensors, row, position, tensors.page_size)
    if (position >= tensors.capacity).any() or (page < 0).any():
        raise ValueError(
            f"append_tokens: no room for {count.tolist()} tokens behind {before.tolist()}: "
            f"expected pages for them, within {tensors.capacity} tokens"
        )

    if step.cos is not None and step.sin is not None:
        k, k_win = (rotated(x, step.cos, step.sin) for x in (k, k_win))
    tensors.k[page, place] = k[row, at].to(tensors.k.dtype)
    tensors.v[page, place] = v[row, at].to(tensors.v.dtype)
    if tensors.raw_table is not None:
        # Kernels load the places of strides that end no block; what was there may be NaN, which no weight takes away.
        empty = ((position + 1) % config.compress_stride == 0) & (position + 1 < config.compress_block_size)
        place = position % tensors.page_size // config.compress_stride
        for x in (tensors.k_cmp, tensors.v_cmp):
            x[page[empty], place[empty]] = 0.0
    for ring, x, table in (
        (tensors.k_win, k_win, tensors.window_table),
        (tensors.v_win, v_win, tensors.window_table),
        (tensors.k_raw, k_raw, tensors.raw_table),
        (tensors.v_raw, v_raw, tensors.raw_table),
    ):
        if ring is not None:
            page = _ring_of(table, row, position, ring.shape[1])
            held = page >= 0
            ring[page[held], (position % ring.shape[1])[held]] = x[row[held], at[held]].to(ring.dtype)

    length, stride = config.compress_block_size, config.compress_stride
    last = before[:, None] // stride + torch.arange(-(-t // stride), device=k.device)
    complete = ((last + 1) * stride <= (before + count)[:, None]) & ((last + 1) * stride >= length)
    row, at = complete.nonzero(as_tuple=True)
    last = last[row, at]
    token = (last[:, None] + 1) * stride - length + torch.arange(length, device=k.device)
    page, place = _page_and_place(tensors, row, last, tensors.page_size // stride)
    slot = token % tensors.k_raw.shape[1]
    ring = _ring_of(tensors.raw_table, row[:, None], token, tensors.k_raw.shape[1]).clamp(min=0)
    blocks_k, blocks_v = (x[ring, slot].transpose(1, 2) for x in (tensors.k_raw, tensors.v_raw))
    keys, values = (PHI[config.compression](x, *of) for x, of in zip((blocks_k, blocks_v), phi, strict=True))
    keys = rotated(keys, step.cos_cmp[row, at], step.sin_cmp[row, at])
    tensors.k_cmp[page, place] = keys.to(tensors.k_cmp.dtype)
    tensors.v_cmp[page, place] = values.to(tensors.v_cmp.dtype)
    tensors.lengths.add_(count.to(tensors.lengths.dtype))


def decode_attention(
    q: Float[Tensor, "b t h d"],
    gates: Float[Tensor, "b t h 3"],
    tensors: CacheTensors,
    config: NSAConfig,
    *,
    scale: float | None = None,
    counts: Int32[Tensor, " b"] | None = None,
    cos: Float[Tensor, "b t d"] | None = None,
    sin: Float[Tensor, "b t d"] | None = None,
) -> Float[Tensor, "b t h e"]:
    """`native_sparse_attention` of the last t tokens of every row of a cache; t is small.

    Args:
        q: queries, the last of them at position lengths - 1 of its row.
        gates: one scalar per query, head and branch, in the order cmp, slc, win.
        tensors: the cache, the queries' own tokens included.
        config: block sizes and counts.
        scale: factor of the scores, d ** -0.5 by default.
        counts: how many of the t columns are queries, the last ones of each row; by default all.
        cos, sin: rotary factors of the queries [b, t, d], where q is not rotated yet.

    Returns:
        [b, t, h, e] in q's dtype; 0 for padding columns and for queries at a negative position, so for all of a row of
        length 0. A branch in which a query sees no key adds 0.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    Source: paper eqs. 5 and 8 to 12. Tested against the fp64 brute force of nsa.testing.
    """
    tensors.check_queries(config, q, gates, counts)
    if cos is not None and sin is not None:
        q = rotated(q, cos, sin)
    t, stride = q.shape[1], config.compress_stride
    lengths = tensors.lengths.long()
    longest = int(lengths.max()) if len(lengths) else 0
    k, v = (_gathered(tensors, x, lengths, longest) for x in (tensors.k, tensors.v))
    # Block i lies in the place of its last stride; the places before that of block 0 hold nothing.
    empty = config.compress_block_size // stride - 1
    num_blocks = config.num_compressed_blocks(longest)
    strides = lengths // stride
    k_cmp, v_cmp = (
        _gathered(tensors, x, strides, num_blocks + empty)[:, empty:] if num_blocks else x.new_zeros(len(q), 0, *tail)
        for x, tail in ((tensors.k_cmp, k.shape[2:]), (tensors.v_cmp, v.shape[2:]))
    )
    near = min(config.window_size + t - 1, longest)
    lengths_win = lengths.clamp(max=near)
    position = (lengths - lengths_win)[:, None] + torch.arange(near, device=q.device)
    if tensors.k_win is None or tensors.v_win is None:
        row = torch.arange(len(q), device=q.device)[:, None]
        k_win, v_win = (x[row, position.clamp(max=max(0, longest - 1))] for x in (k, v))
    else:
        row, size = torch.arange(len(q), device=q.device)[:, None], tensors.k_win.shape[1]
        if tensors.window_table is not None:
            row = tensors.window_table[row, (position // size).clamp(max=tensors.window_table.shape[1] - 1)].long()
        k_win, v_win = (x[row, position % size] for x in (tensors.k_win, tensors.v_win))

    where = (None, None, lengths, lengths_win)
    branches = Branches.of(config, (k_cmp, v_cmp, k, v, k_win, v_win), where)
    out_cmp, _, indices = attend_and_select(q, branches.cmp, config, scale=scale)
    blocks = Blocks(indices, config.select_block_size, config.num_local_blocks)
    out_slc, _ = attend(q, branches.slc, blocks, scale=scale, backend="torch")
    out_win, _ = attend(q, branches.win, Window(config.window_size), scale=scale, backend="torch")
    out = combine(out_cmp, out_slc, out_win, gates)
    if counts is None:
        return out
    padding = torch.arange(t, device=q.device) < t - counts[:, None]
    return out.masked_fill(padding[:, :, None, None], 0.0)


def _page_and_place(tensors: CacheTensors, row: Tensor, index: Tensor, per_page: int) -> tuple[Tensor, Tensor]:
    """Where token (or stride) `index` of a row lies: its page, and its place in it."""
    column = (index // per_page).clamp(max=tensors.block_table.shape[1] - 1)
    return tensors.block_table[row, column].long(), index % per_page


def _ring_of(table: Tensor | None, row: Tensor, position: Tensor, size: int) -> Tensor:
    """The ring that a row's token lies in: its own, or a page by the table, -1 where it has none."""
    if table is None:
        return row.expand_as(position)
    column = position // size
    page = table[row, column.clamp(max=table.shape[1] - 1)].long()
    return page.where(column < table.shape[1], -1)


def _gathered(tensors: CacheTensors, memory: Tensor, lengths: Tensor, longest: int) -> Tensor:
    """The first `longest` entries of every row, side by side; what lies past a row's length is 0."""
    index = torch.arange(longest, device=memory.device).expand(len(lengths), longest)
    row = torch.arange(len(lengths), device=memory.device)[:, None].expand_as(index)
    page, place = _page_and_place(tensors, row, index, memory.shape[1])
    there = index < lengths[:, None]
    return memory[page, place].masked_fill(~there[:, :, None, None], 0.0)
