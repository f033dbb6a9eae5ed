"""Which tokens of a sequence a rank holds: two of 2 P equal chunks, so that every rank has as much past to attend to.

    rank r of P holds the chunks r and 2 P - 1 - r, in this order

The tokens of chunk c are [c n, (c + 1) n), n = ceil(T / 2 P); what the last chunks lack is padding after the end.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # a label that no loss counts


@dataclass(frozen=True)
class ZigZag:
    """The share of rank `rank` of `size`: plain numbers, also for a process that makes batches."""

    rank: int
    size: int

    @property
    def chunks(self) -> tuple[int, int]:
        """The numbers of this rank's chunks."""
        return self.rank, 2 * self.size - 1 - self.rank

    def spans(self, length: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """First token and end of each of them, in a sequence of `length` tokens, a multiple of 2 P."""
        n = length // (2 * self.size)
        low, high = self.chunks
        return (low * n, (low + 1) * n), (high * n, (high + 1) * n)

    def padded(self, length: int) -> int:
        """The multiple of 2 P that `length` tokens are padded to.

        Raises:
            ValueError: fewer tokens than chunks.
        """
        if length < 2 * self.size:
            raise ValueError(
                f"context parallelism over {self.size} ranks: a row should have at least {2 * self.size} tokens, one "
                f"for each of its {2 * self.size} chunks, got {length}"
            )
        return -(-length // (2 * self.size)) * 2 * self.size

    def shard(self, x: Tensor, fill: float = 0) -> Tensor:
        """This rank's part of x [b, t, ...], padded with `fill`."""
        missing = self.padded(x.shape[1]) - x.shape[1]
        if missing:
            x = F.pad(x, [0, 0] * (x.dim() - 2) + [0, missing], value=fill)
        return torch.cat([x[:, start:stop] for start, stop in self.spans(x.shape[1])], 1)

    def shard_batch(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """This rank's part of a batch of whole sequences, for a model that is context parallel.

        Args:
            batch: input_ids [b, t]; where given, labels and weights [b, t], position_ids [b or 1, t], and for packed
                rows (b = 1) cu_seq_lens_q and max_length_q. Other entries stay as they are.

        Returns:
            input_ids, and position_ids where they were given, [b, t'] with t' = ceil(t / 2 P) * 2; labels, moved to the
            token before, under `labels` and `shift_labels`, and weights with them; cu_seq_lens_q of all tokens, the
            padding a sequence of its own.

        Raises:
            ValueError: fewer tokens in a row than chunks; packed rows with b > 1; a mask of padding.
        """
        ids = batch["input_ids"]
        b, t = ids.shape
        if batch.get("attention_mask") is not None:
            raise ValueError("context parallelism: expected rows without padding and no attention_mask; pack them")
        out = dict(batch, input_ids=self.shard(ids))
        if (positions := batch.get("position_ids")) is not None:
            out["position_ids"] = self.shard(positions)
        if (labels := batch.get("labels")) is not None:
            moved = self.shard(F.pad(labels[:, 1:], (0, 1), value=IGNORED), fill=IGNORED)
            out.update(labels=moved, shift_labels=moved)
            if (weights := batch.get("weights")) is not None:
                out["weights"] = self.shard(F.pad(weights[:, 1:], (0, 1)))
        if (bounds := batch.get("cu_seq_lens_q")) is not None:
            if b != 1:
                raise ValueError(f"context parallelism: packed sequences should come as one row, got {b} rows")
            if self.padded(t) != t:
                out["cu_seq_lens_q"] = F.pad(bounds, (0, 1), value=self.padded(t))
            for name in ("cu_seq_lens_k", "max_length_k"):
                out.pop(name, None)
        return out
