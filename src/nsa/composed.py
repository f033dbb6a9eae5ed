"""Native Sparse Attention composed of the PyTorch operations: the six steps, and the same as one operator.

What the steps do depends on lengths, which a traced program does not know: for torch.compile, torch.export and fake
tensors they are one operator that is not looked into, whose backward computes the forward once more. The kernels are
operators of their own (`nsa.kernels.library`).
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from nsa.config import NSAConfig
from nsa.ops.causal_attention import causal_attention
from nsa.ops.combine import combine
from nsa.ops.compressed_attention import compressed_attention
from nsa.ops.selected_attention import selected_attention
from nsa.ops.selection import compressed_attention_and_selection
from nsa.ops.window_attention import window_attention
from nsa.shapes import Sequences


def composed(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, k: Tensor, v: Tensor, k_win: Tensor, v_win: Tensor, gates: Tensor,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, seqlens_k: Tensor | None, seqlens_win: Tensor | None,
    config: NSAConfig, scale: float,
) -> Tensor:  # fmt: skip
    """`native_sparse_attention` by the PyTorch operations, its defaults filled in."""
    sequences = Sequences(cu_seqlens_q, cu_seqlens_k, seqlens_k)
    sequences_win = sequences if seqlens_win is None else Sequences(seqlens_k=seqlens_win)
    selects_all = _sees_all(q, k, v, sequences, config.num_selected_blocks * config.select_block_size)
    sees_all = _sees_all(q, k_win, v_win, sequences_win, config.window_size)
    if selects_all:
        out_cmp, _ = compressed_attention(q, k_cmp, v_cmp, config, num_keys=k.shape[1], scale=scale)
        out_slc = causal_attention(q, k, v, scale=scale)
    else:
        out_cmp, _, block_indices = compressed_attention_and_selection(
            q, k_cmp, v_cmp, config, num_keys=k.shape[1], sequences=sequences, scale=scale
        )
        out_slc, _ = selected_attention(q, k, v, block_indices, config, sequences=sequences, scale=scale)
    if sees_all and selects_all and k_win is k and v_win is v:
        out_win = out_slc
    elif sees_all:
        out_win = causal_attention(q, k_win, v_win, scale=scale)
    else:
        out_win, _ = window_attention(q, k_win, v_win, config.window_size, sequences=sequences_win, scale=scale)
    return combine(out_cmp, out_slc, out_win, gates)


def _sees_all(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, reach: int) -> bool:
    """Whether a branch that reaches so far sees all of the past, and PyTorch has a kernel for that."""
    is_whole = sequences.is_uniform and 0 < k.shape[1] == q.shape[1] <= reach
    return is_whole and q.device.type == "cpu" and k.shape[-1] == v.shape[-1]


def is_traced(x: Tensor) -> bool:
    """Whether values are not there to be looked at."""
    return torch.compiler.is_compiling() or x.is_meta or isinstance(x, FakeTensor)


@torch.library.custom_op("nsa::composed_attention", mutates_args=())
def composed_attention(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, k: Tensor, v: Tensor, k_win: Tensor, v_win: Tensor, gates: Tensor,
    cu_q: Tensor | None, cu_k: Tensor | None, lengths: Tensor | None, lengths_win: Tensor | None,
    sizes: list[int], scale: float,
) -> Tensor:  # fmt: skip
    inputs = (q, k_cmp, v_cmp, k, v, k_win, v_win, gates)
    return composed(*inputs, cu_q, cu_k, lengths, lengths_win, NSAConfig.from_sizes(sizes), scale).contiguous()


@composed_attention.register_fake
def _(q, k_cmp, v_cmp, k, v, *_):
    return q.new_empty(*q.shape[:3], v.shape[3])


@torch.library.custom_op("nsa::composed_attention_backward", mutates_args=())
def composed_attention_backward(
    d_out: Tensor, inputs: list[Tensor],
    cu_q: Tensor | None, cu_k: Tensor | None, lengths: Tensor | None, lengths_win: Tensor | None,
    sizes: list[int], scale: float,
) -> list[Tensor]:  # fmt: skip
    with autograd_inside(), torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = composed(*_eight(leaves), cu_q, cu_k, lengths, lengths_win, NSAConfig.from_sizes(sizes), scale)
        grads = torch.autograd.grad(out, leaves, d_out, allow_unused=True, materialize_grads=True)
    return [grad.contiguous() for grad in grads]


def _eight(x: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k_cmp, v_cmp, k, v, k_win, v_win, gates = x
    return q, k_cmp, v_cmp, k, v, k_win, v_win, gates


@contextmanager
def autograd_inside() -> Iterator[None]:
    """Inside an operator the dispatcher leaves autograd out; here it is wanted."""
    keys = torch._C.DispatchKey
    with ExitStack() as stack:
        for key in (keys.AutogradFunctionality, keys.ADInplaceOrView):
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        yield


@composed_attention_backward.register_fake
def _(d_out, inputs, *_):
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:12])
    ctx.rest = inputs[12:]


def _gradients(ctx, d_out):
    tensors = ctx.saved_tensors
    grads = composed_attention_backward(d_out, list(tensors[:8]), *tensors[8:], *ctx.rest)
    return *grads, *[None] * 6


composed_attention.register_autograd(_gradients, setup_context=_save)
