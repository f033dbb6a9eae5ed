"""A decoding step over block tables in which every row has the same few columns: nothing of it is read on the host.

Where the kernels serve, all that is launched follows from shapes, so a step may be captured in a CUDA graph and
replayed with other tables, lengths and tokens in the same storage.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from nsa.cache_tensors import CacheTensors
from nsa.config import NSAConfig
from nsa.decode_step import DecodeStep, Rotary
from nsa.decoding import MAX_QUERIES, PhiWeights, append_tokens, decode_attention
from nsa.serving.blocks import LayerBlocks
from nsa.streams import Branches


@dataclass(frozen=True)
class DecodeTables:
    """Rows that have t columns each, all of them new tokens or, in padding, none.

    t: columns of a row, at most 16.
    table, table_win, table_raw: block tables as an engine has them, -1 where it has its null block; the window's is
        None with shared keys and values.
    lengths: tokens of each row, the new ones included; 0 in padding.
    counts: new tokens of each row, t or 0.
    arrivals: counters of the kernels, 0 between two of them.
    """

    t: int
    table: Int32[Tensor, "rows n"]
    table_win: Int32[Tensor, "rows n_win"] | None
    table_raw: Int32[Tensor, "rows n_raw"]
    lengths: Int32[Tensor, " rows"]
    counts: Int32[Tensor, " rows"]
    arrivals: Int32[Tensor, "rows g 16"]

    def step(
        self, num_layers: int, config: NSAConfig, rotary: Rotary, like: Tensor
    ) -> tuple[DecodeStep, list[Int32[Tensor, " rows"]]]:
        """What all layers share, and for each of them the lengths before the step, which appending advances."""
        before = self.lengths - self.counts
        # Every column of a row with tokens is one; padding has lengths of 0, and needs counts to say so.
        step = DecodeStep.after(before, self.t, self.counts, config, rotary, like)
        return step, list(before.expand(num_layers, -1).contiguous())


@torch.no_grad()
def decode(
    memory: LayerBlocks,
    tables: DecodeTables,
    step: DecodeStep,
    before: Int32[Tensor, " rows"],
    q: Float[Tensor, "tokens h d"],
    gates: Float[Tensor, "tokens h 3"],
    new: Sequence[Float[Tensor, "tokens g _"]],
    phi: PhiWeights,
    config: NSAConfig,
) -> Float[Tensor, "tokens h e"]:
    """`nsa.serving.append` and `attend` of a step with these tables: new tokens written, then attended from.

    Args:
        memory: the layer's blocks, written in place.
        tables: where rows lie.
        step, before: of `tables.step`; `before` is the layer's own, and `tables.lengths` afterwards.
        q, gates: of the packed tokens, row after row; not rotated. Those behind rows * t are padding.
        new: k, v, k_win, v_win, k_raw, v_raw of them, not rotated; with shared keys and values k, v alone.
        phi: weights of compression, for keys and for values.
        config: block sizes.

    Returns:
        [tokens, h, e] in q's dtype, 0 for padding.
    """
    rows, t = len(tables.lengths), tables.t
    if not 1 <= t <= MAX_QUERIES:
        raise ValueError(f"decode: expected 1 to {MAX_QUERIES} columns, got {t}")
    if rows * t > len(q):
        raise ValueError(f"decode: expected tokens for {rows} rows of {t} columns, got {len(q)}")

    def columns(x: Tensor) -> Tensor:
        return x[: rows * t].unflatten(0, (rows, t))

    k, v, k_win, v_win, k_raw, v_raw = map(columns, new if len(new) == 6 else (*new, *new, *new))
    tensors = CacheTensors(
        memory.k, memory.v, memory.k_cmp, memory.v_cmp, memory.k_win, memory.v_win, memory.k_raw, memory.v_raw,
        tables.table, before, tables.arrivals, tables.table_win, tables.table_raw,
    )  # fmt: skip
    append_tokens(tensors, Branches.of_tokens(k_raw, v_raw, k, v, k_win, v_win), config, phi, step)
    out = decode_attention(
        columns(q), columns(gates), tensors, config, counts=tables.counts, cos=step.cos, sin=step.sin
    ).flatten(0, 1)
    if len(out) == len(q):
        return out
    return torch.cat([out, out.new_zeros(len(q) - len(out), *out.shape[1:])])
