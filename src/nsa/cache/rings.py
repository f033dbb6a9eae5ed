"""The rings of a fixed cache: the token at position p lies in slot p % ring, [rows, slots, heads, dim]."""

import torch
from torch import Tensor


def write_ring(ring: Tensor, run: slice, start: int, x: Tensor) -> None:
    """Put x [rows, t, g, .] at positions start .. start + t - 1; what does not fit, its first tokens, is left out."""
    end, t = start + x.shape[1], x.shape[1]
    first = end - min(ring.shape[1], t)
    for slots, count in _slots(ring, first, end):
        ring[run, slots] = x[:, first - start : first - start + count]
        first += count


def after(ring: Tensor, run: slice, first: int, start: int, x: Tensor) -> Tensor:
    """The ring's positions first .. start - 1, then x, whose first position is start; x itself if that is all."""
    before = [ring[run, slots] for slots, _ in _slots(ring, first, start)]
    return torch.cat([*before, x], dim=1) if before else x


def read_rings(ring: Tensor, firsts: list[int], lengths: list[int]) -> Tensor:
    """Row r's positions firsts[r] .. lengths[r] - 1, left-aligned, in memory of its own."""
    rows = [slice(row, row + 1) for row in range(len(lengths))]
    parts = [
        torch.cat([ring[run, slots] for slots, _ in _slots(ring, first, until)] or [ring[run, :0]], dim=1)
        for run, first, until in zip(rows, firsts, lengths, strict=True)
    ]
    return left_aligned(parts, rows)


def left_aligned(parts: list[Tensor], runs: list[slice]) -> Tensor:
    """Runs of rows [rows, m, g, .] with different m as one tensor, zeros behind."""
    if len(parts) == 1 and runs[0].start == 0:
        return parts[0]
    longest = max(part.shape[1] for part in parts)
    whole = parts[0].new_zeros(runs[-1].stop, longest, *parts[0].shape[2:])
    for part, run in zip(parts, runs, strict=True):
        whole[run, : part.shape[1]] = part
    return whole


def _slots(ring: Tensor, first: int, until: int) -> list[tuple[slice, int]]:
    """Where the positions first .. until - 1 lie, no more than the ring is long: runs of slots, and how many each."""
    size = ring.shape[1]
    runs = []
    while first < until:
        slot = first % size
        count = min(until - first, size - slot)
        runs.append((slice(slot, slot + count), count))
        first += count
    return runs
