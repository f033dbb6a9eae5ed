"""Ways in which sequences lie in a batch; every op is tested in all of them."""

from dataclasses import dataclass

import torch

from nsa.config import NSAConfig
from nsa.shapes import Sequences
from nsa.testing import Member, members


@dataclass(frozen=True, kw_only=True)
class Layout:
    """b rows, t queries and s keys, and the sequences in them."""

    b: int = 1
    t: int
    s: int
    cu_seqlens_q: tuple[int, ...] | None = None
    cu_seqlens_k: tuple[int, ...] | None = None
    seqlens_k: tuple[int, ...] | None = None

    def lengths(self) -> dict[str, torch.Tensor]:
        """The arguments of `native_sparse_attention` and `Sequences` that say so."""
        names = ("cu_seqlens_q", "cu_seqlens_k", "seqlens_k")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return {name: torch.tensor(values, dtype=torch.int32) for name, values in given.items()}

    def sequences(self) -> Sequences:
        return Sequences(**self.lengths())

    def members(self, config: NSAConfig) -> list[Member]:
        names = ("cu_seqlens_q", "cu_seqlens_k", "seqlens_k")
        given = {name: list(getattr(self, name)) for name in names if getattr(self, name) is not None}
        return members(self.b, self.t, self.s, config, **given)

    def num_compressed_blocks(self, config: NSAConfig) -> int:
        """Size of the dimension that holds the compressed blocks."""
        if self.seqlens_k is not None:
            return config.num_compressed_blocks(self.s)
        return max((member.block_range.stop for member in self.members(config)), default=0)

    def positions(self, config: NSAConfig) -> torch.Tensor:
        """Of the queries in their own sequences, [b, t]; negative for padding."""
        found = torch.zeros(self.b, self.t, dtype=torch.long)
        for member in self.members(config):
            num_queries = member.query_range.stop - member.query_range.start
            first = member.length - num_queries
            found[member.row, member.query_range] = torch.arange(first, member.length)
        return found


LAYOUTS = {
    "whole": Layout(b=2, t=45, s=45),
    "suffix": Layout(b=2, t=17, s=45),
    "decode": Layout(b=2, t=1, s=45),
    "packed": Layout(t=58, s=58, cu_seqlens_q=(0, 20, 23, 23, 24, 58)),
    "packed suffixes": Layout(t=17, s=70, cu_seqlens_q=(0, 9, 9, 10, 17), cu_seqlens_k=(0, 30, 30, 33, 70)),
    "ragged rows": Layout(b=4, t=6, s=45, seqlens_k=(45, 0, 3, 18)),
    "left padded": Layout(b=3, t=40, s=40, seqlens_k=(40, 25, 1)),
    "one token": Layout(t=1, s=1),
}
