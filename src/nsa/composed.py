"""Attention composed of the PyTorch operations as one operator, for torch.compile, torch.export and fake tensors.

What the operations do depends on lengths, which a traced program does not know: it does not look into the operator,
whose backward computes the forward once more. The kernels are operators of their own (`nsa.kernels.library`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def is_traced(x: Tensor) -> bool:
    """Whether values are not there to be looked at."""
    return torch.compiler.is_compiling() or x.is_meta or isinstance(x, FakeTensor)


def as_operator(
    name: str, attend: Callable[[Sequence[Tensor], Sequence[Tensor | None], list[int], float], Tensor]
) -> Callable[[list[Tensor], list[Tensor | None], list[int], float], Tensor]:
    """The operator nsa::name of `attend(tensors, lengths, sizes, scale)`.

    tensors: all that has a gradient; q [b, t, h, d] first and v [b, s, g, e] of any branch third, so that the output
        is [b, t, h, e].
    """

    @torch.library.custom_op(f"nsa::{name}", mutates_args=())
    def forward(tensors: list[Tensor], lengths: list[Tensor | None], sizes: list[int], scale: float) -> Tensor:
        return attend(tensors, lengths, sizes, scale).contiguous()

    @torch.library.custom_op(f"nsa::{name}_backward", mutates_args=())
    def backward(
        d_out: Tensor, tensors: list[Tensor], lengths: list[Tensor | None], sizes: list[int], scale: float
    ) -> list[Tensor]:
        with autograd_inside(), torch.enable_grad(), torch.autocast(d_out.device.type, enabled=False):
            leaves = [x.detach().requires_grad_() for x in tensors]
            out = attend(leaves, lengths, sizes, scale)
            grads = torch.autograd.grad(out, leaves, d_out, allow_unused=True, materialize_grads=True)
        return [grad.contiguous() for grad in grads]

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        tensors, lengths, *ctx.rest = inputs
        ctx.num_tensors = len(tensors)
        ctx.save_for_backward(*tensors, *lengths)

    def gradients(ctx: Any, d_out: Tensor) -> tuple[Any, ...]:
        saved = list(ctx.saved_tensors)  # asked for once: gradient checkpointing gives them once
        tensors, lengths = saved[: ctx.num_tensors], saved[ctx.num_tensors :]
        return backward(d_out, tensors, lengths, *ctx.rest), None, None, None

    forward.register_fake(lambda tensors, *_: tensors[0].new_empty(*tensors[0].shape[:3], tensors[2].shape[3]))
    backward.register_fake(
        lambda _, tensors, *__: [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]
    )
    forward.register_autograd(gradients, setup_context=save)
    return forward


@contextmanager
def autograd_inside() -> Iterator[None]:
    """Inside an operator the dispatcher leaves autograd out; here it is wanted."""
    keys = torch._C.DispatchKey
    with ExitStack() as stack:
        for key in (keys.AutogradFunctionality, keys.ADInplaceOrView):
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        yield
