"""Native Sparse Attention over several devices: sequences (context parallelism) or heads (tensor) held by many."""

from torch import nn
from torch.distributed import DeviceMesh, ProcessGroup

from nsa.distributed.context import ContextParallel
from nsa.distributed.tensor import tensor_parallel
from nsa.distributed.zigzag import ZigZag

__all__ = ["ContextParallel", "ZigZag", "context_parallel", "tensor_parallel"]


def context_parallel(model: nn.Module, mesh: DeviceMesh | ProcessGroup) -> ContextParallel:
    """From now on each rank of `mesh` calls the model with its part of the sequences, as `ZigZag` makes them.

    Args:
        model: a model of `nsa.models`, or anything that holds `nsa.NativeSparseAttention`.
        mesh: of one dimension, such as `mesh["cp"]`, or a group.

    Returns:
        the ranks together; `.zigzag.shard_batch` takes a batch apart. A rank's gradients are those of its own tokens:
        to be added up over the mesh, as FSDP does whose mesh includes it.

    Raises:
        ValueError: nothing in the model knows of context parallelism.
    """
    context = ContextParallel.of(mesh)
    found = [module for module in model.modules() if hasattr(type(module), "context")]
    if not found:
        raise ValueError(f"context_parallel: expected a model with NSA or one of its twins, got {type(model).__name__}")
    for module in found:
        module.context = context  # type: ignore[assignment]
    return context
