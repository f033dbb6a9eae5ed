"""What ranks that share sequences say to each other: all of a tensor to everyone, gradients back to their owners."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
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

    def gather(self, x: Tensor) -> Tensor:
        """[b, 2 m, ...] of every rank -> [b, 2 m P, ...], chunks in their order; without gradients."""
        if self.size == 1:
            return x
        parts = x.new_empty(self.size * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(parts, x.contiguous(), group=self.group)
        low, high = parts.unflatten(0, (self.size, -1)).unflatten(2, (2, -1)).unbind(2)  # [P, b, m, ...]
        return torch.cat([low, high.flip(0)]).transpose(0, 1).flatten(1, 2)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """The inverse of `gather` for gradients: what all ranks have for this rank's part, added up."""
        if self.size == 1:
            return x
        low, high = x.unflatten(1, (2, self.size, -1)).unbind(1)  # [b, P, m, ...]
        parts = torch.stack([low, high.flip(1)], 2).transpose(0, 1).flatten(2, 3).flatten(0, 1)
        own = torch.empty_like(parts[: len(x)])
        dist.reduce_scatter_tensor(own, parts.contiguous(), group=self.group)
        return own

    def windows(self, x: Tensor, windows: tuple[Window, ...], order: Order | None = None) -> tuple[Tensor, ...]:
        """Runs [:, start:stop] of all of x, of which every rank holds a part [b, 2 m, ...].

        Gradients from all ranks and windows are added up in fp32 (fp64 for fp64).
        """
        return _Windows.apply(x, self, windows, order)


class _Windows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, context: ContextParallel, windows: tuple[Window, ...], order: Order | None
    ) -> tuple[Tensor, ...]:
        ctx.context, ctx.windows, ctx.order, ctx.dtype = context, windows, order, x.dtype
        everything = context.gather(x)
        if order is not None:
            everything = everything.index_select(1, order.of) if len(order.of) else everything[:, :0]
        ctx.shape = everything.shape
        return tuple(everything[:, start:stop] for start, stop in windows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wide = torch.promote_types(ctx.dtype, torch.float32)
        total = grads[0].new_zeros(ctx.shape, dtype=wide)
        for (start, stop), grad in zip(ctx.windows, grads, strict=True):
            total[:, start:stop] += grad
        if ctx.order is not None and total.shape[1] > 0:
            exists = ctx.order.exists.view(1, -1, *[1] * (total.dim() - 2))
            total = total.index_select(1, ctx.order.at).where(exists, 0)
        elif ctx.order is not None:
            total = total.new_zeros(len(total), len(ctx.order.at), *total.shape[2:])
        return ctx.context.reduce_scatter(total).to(ctx.dtype), None, None, None
