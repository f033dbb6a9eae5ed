"""What ranks that share sequences say to each other: all of a tensor to everyone, gradients back to their owners."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import DeviceMesh, ProcessGroup

from nsa.distributed.zigzag import ZigZag

Window = tuple[int, int]  # of tokens: the first, and the end


@dataclass(frozen=True)
class Order:
    """What lies where in a gathered tensor that holds padding among its rows.

    of: rows in their order, int [c].
    at, exists: for each gathered row its number in that order, any legal one where it is padding, int and bool [m].
    """

    of: Tensor
    at: Tensor
    exists: Tensor


@dataclass(frozen=True)
class ContextParallel:
    """The ranks of `group` hold sequences together, as `ZigZag` says."""

    group: ProcessGroup

    @classmethod
    def of(cls, mesh: DeviceMesh | ProcessGroup) -> "ContextParallel":
        """Of a mesh with one dimension, such as `mesh["cp"]`, or of a group."""
        return cls(mesh.get_group() if isinstance(mesh, DeviceMesh) else mesh)

    @property
    def size(self) -> int:
        return dist.get_world_size(self.group)

    @property
    def zigzag(self) -> ZigZag:
        return ZigZag(dist.get_rank(self.group), self.size)

    def start(self, x: Tensor) -> "Gathering":
        """Begin to gather x; the device may do something else meanwhile."""
        x = x.detach().contiguous()
        parts = x.new_empty(self.size * len(x), *x.shape[1:])
        return Gathering(x, parts, dist.all_gather_into_tensor(parts, x, group=self.group, async_op=True))

    def gather(self, x: Tensor, started: "Gathering | None" = None) -> Tensor:
        """[b, 2 m, ...] of every rank -> [b, 2 m P, ...], chunks in their order; without gradients."""
        if self.size == 1:
            return x
        parts = (started or self.start(x)).wait()
        parts = parts.unflatten(0, (self.size, -1)).unflatten(2, (2, -1))  # [P, b, 2, m, ...]
        return torch.cat([*parts[:, :, 0].unbind(), *reversed(parts[:, :, 1].unbind())], 1)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """The inverse of `gather` for gradients: what all ranks have for this rank's part, added up."""
        if self.size == 1:
            return x
        chunks = x.chunk(2 * self.size, 1)
        parts = torch.cat([torch.cat([chunks[rank], chunks[-1 - rank]], 1) for rank in range(self.size)])
        own = torch.empty_like(parts[: len(x)])
        dist.reduce_scatter_tensor(own, parts, group=self.group)
        return own

    def windows(
        self, x: Tensor, windows: tuple[Window, ...], order: Order | None = None, started: "Gathering | None" = None
    ) -> tuple[Tensor, ...]:
        """Runs [:, start:stop] of all of x, of which every rank holds a part [b, 2 m, ...].

        Gradients from all ranks and windows are added up in fp32 (fp64 for fp64). Where the runs are the rank's chunks
        and no more tokens before them than a chunk has, only those are sent.
        """
        if order is None and started is None:
            spans = self.zigzag.spans(x.shape[1] * self.size)
            halo = spans[1][0] - windows[-1][0]
            if halo <= x.shape[1] // 2 and windows == tuple((max(0, start - halo), stop) for start, stop in spans):
                return _Halo.apply(x, self, halo)
        return _Windows.apply(x, self, windows, order, started)

    def swap(self, before: Tensor | None, after: Tensor) -> tuple[Tensor | None, Tensor]:
        """Send one tensor to the rank before this one, one to the next; what they send to this one comes back.

        The first rank has none before it; the next one of the last is itself, which holds both middle chunks.
        """
        rank = self.zigzag.rank
        peers = [rank - 1] * (before is not None) + [min(rank + 1, self.size - 1)]
        x = torch.stack([after] if before is None else [before, after])
        counts = [peers.count(peer) for peer in range(self.size)]
        got = torch.empty_like(x)
        dist.all_to_all_single(got, x, counts, counts, group=self.group)
        return (None if before is None else got[0]), got[-1]


@dataclass(frozen=True)
class Gathering:
    """What is on its way from all ranks."""

    source: Tensor
    parts: Tensor
    work: Any

    def wait(self) -> Tensor:
        self.work.wait()
        return self.parts


def from_the_first(parts: tuple[Tensor, ...], windows: tuple[Window, ...]) -> tuple[Tensor, ...]:
    """Each part [b, n, g, d] as long as all tokens up to its window's end, zeros before the window."""
    return tuple(F.pad(part, (0, 0, 0, 0, first, 0)) for part, (first, _) in zip(parts, windows, strict=True))


class _Windows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        context: ContextParallel,
        windows: tuple[Window, ...],
        order: Order | None,
        started: Gathering | None,
    ) -> tuple[Tensor, ...]:
        ctx.context, ctx.windows, ctx.order, ctx.dtype = context, windows, order, x.dtype
        everything = context.gather(x, started)
        if order is not None:
            everything = everything.index_select(1, order.of) if len(order.of) else everything[:, :0]
        ctx.shape = everything.shape
        return tuple(everything[:, start:stop] for start, stop in windows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wide = torch.promote_types(ctx.dtype, torch.float32)
        total = grads[0].new_empty(ctx.shape, dtype=wide)
        first, end = ctx.windows[-1]
        total[:, :first], total[:, first:end], total[:, end:] = 0, grads[-1], 0
        for (start, stop), grad in zip(ctx.windows[:-1], grads[:-1], strict=True):
            total[:, start:stop] += grad
        if ctx.order is not None and total.shape[1] > 0:
            exists = ctx.order.exists.view(1, -1, *[1] * (total.dim() - 2))
            total = total.index_select(1, ctx.order.at).where(exists, 0)
        elif ctx.order is not None:
            total = total.new_zeros(len(total), len(ctx.order.at), *total.shape[2:])
        return ctx.context.reduce_scatter(total).to(ctx.dtype), None, None, None, None


class _Halo(torch.autograd.Function):
    """Each chunk with the `halo` tokens before it: the tails of low chunks go to the next rank, of high ones back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, context: ContextParallel, halo: int) -> tuple[Tensor, ...]:
        ctx.context, ctx.halo = context, halo
        low, high = x.chunk(2, 1)
        if halo == 0:
            return low.clone(), high.clone()
        first = context.zigzag.rank == 0
        before_low, before_high = context.swap(None if first else high[:, -halo:], low[:, -halo:])
        return low.clone() if before_low is None else torch.cat([before_low, low], 1), torch.cat([before_high, high], 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_low: Tensor, d_high: Tensor) -> tuple[Tensor | None, ...]:
        halo, first, dtype = ctx.halo, ctx.context.zigzag.rank == 0, d_low.dtype
        if halo == 0:
            return torch.cat([d_low, d_high], 1), None, None
        wide = torch.promote_types(dtype, torch.float32)
        tail_high, tail_low = ctx.context.swap(None if first else d_low[:, :halo], d_high[:, :halo])
        grad = torch.cat([d_low if first else d_low[:, halo:], d_high[:, halo:]], 1).to(wide)
        low, high = grad.chunk(2, 1)
        low[:, -halo:] += tail_low
        if tail_high is not None:
            high[:, -halo:] += tail_high
        return grad.to(dtype), None, None
