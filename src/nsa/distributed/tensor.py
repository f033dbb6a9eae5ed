"""Tensor parallelism: each rank holds some of the KV heads, with the query heads and gates of their groups.

Projections of heads and gates are cut by columns, the output's by rows, as Llama's are. phi serves all KV heads and
stays whole on every rank, which sees the gradient of its own heads only: they are added up.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import DeviceMesh, ProcessGroup
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

STYLES: dict[str, type[ParallelStyle]] = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}


def tensor_parallel(model: nn.Module, mesh: DeviceMesh, plan: Mapping[str, str], num_kv_heads: int) -> None:
    """Give each rank of `mesh` its heads, in place, by torch's `parallelize_module`.

    Args:
        model: holds the modules that `plan` names.
        mesh: of one dimension, such as `mesh["tp"]`.
        plan: name of a module, with * for the number of a layer -> "colwise" or "rowwise", such as the configuration's
            `base_model_tp_plan`.
        num_kv_heads: of all ranks together.

    Raises:
        ValueError: ranks that do not divide the KV heads; another style.
    """
    check_heads(mesh.size(), num_kv_heads)
    unknown = sorted(set(plan.values()) - set(STYLES))
    if unknown:
        raise ValueError(f"tensor_parallel: expected the styles {', '.join(STYLES)}, got {', '.join(unknown)}")
    parallelize_module(model, mesh, {name: STYLES[style]() for name, style in plan.items()})
    share_phi(model, mesh)


def check_heads(ranks: int, num_kv_heads: int) -> None:
    """ValueError where the KV heads cannot be given to so many ranks."""
    if num_kv_heads % ranks:
        raise ValueError(
            f"tensor parallelism: a rank holds whole KV heads; expected a divisor of the {num_kv_heads} KV heads "
            f"(num_kv_heads), got {ranks} ranks"
        )


def share_phi(model: nn.Module, mesh: DeviceMesh) -> None:
    """From now on phi's gradients are those of the heads of all ranks of `mesh`."""
    for module in model.modules():
        if hasattr(type(module), "heads_of"):
            module.heads_of = mesh.get_group()  # type: ignore[assignment]


def summed_gradient(x: Tensor, group: ProcessGroup) -> Tensor:
    """x, whose gradient is the sum of what all ranks of `group` have for it."""
    return _SummedGradient.apply(x, group)


class _SummedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
