"""The kernels as torch.library operators: traced by torch.compile as they are, differentiable, one launch list each.

Every operator gives the layout as (cu_seqlens_q, cu_seqlens_k, seqlens_k, num_keys) and the configuration as seven
integers in the order of `nsa.config.SIZES`. Lengths stay on the device and are trusted: nothing here reads them.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from nsa.backend import why_not_triton
from nsa.config import SIZES, NSAConfig
from nsa.kernels.attention import Layouts, Saved, attention_backward, attention_forward, on_device, pairs
from nsa.kernels.contiguous_backward import contiguous_backward
from nsa.kernels.contiguous_forward import contiguous_forward
from nsa.kernels.launch import as_rows
from nsa.kernels.layout import Layout
from nsa.kernels.rows import rowsum_delta
from nsa.kernels.selected_forward import selected_forward
from nsa.kernels.selected_gradients import selected_gradients
from nsa.kernels.selection import select_top_blocks
from nsa.streams import Blocks, Branches, Reach, Stream, Window


def sizes_of(config: NSAConfig) -> list[int]:
    return [getattr(config, name) for name in SIZES]


def _config(sizes: list[int]) -> NSAConfig:
    return NSAConfig.from_sizes(sizes)


def _layout(
    q: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, lengths: Tensor | None, num_keys: int, block: int, stride: int
) -> Layout:
    return Layout(q.shape[0], q.shape[1], num_keys, block, stride, cu_q, cu_k, lengths)


@contextmanager
def _serving(q: Tensor, *keys_and_values: Tensor, scale: float) -> Iterator[None]:
    """Launch on the tensors' device, or say why the kernels cannot serve."""
    reason = why_not_triton(q, *keys_and_values, scale=scale)
    if reason is not None:
        raise ValueError(f"backend 'triton' cannot serve: {reason}")
    with torch.cuda.device_of(q):
        yield


def _like_out(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out = q.new_empty(*q.shape[:3], v.shape[3])
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


# ---- one contiguous range of keys: compressed (window 0), window, dense ------------------------------------


@torch.library.custom_op("nsa::contiguous_attention", mutates_args=())
def contiguous_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, lengths: Tensor | None,
    num_keys: int, block: int, stride: int, window: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    layout = _layout(q, cu_q, cu_k, lengths, num_keys, block, stride)
    with _serving(q, k, v, scale=scale):
        return contiguous_forward(as_rows(q), as_rows(k), as_rows(v), layout, window or None, scale)


@contiguous_attention.register_fake
def _(q, k, v, cu_q, cu_k, lengths, num_keys, block, stride, window, scale):
    return _like_out(q, v)


@torch.library.custom_op("nsa::contiguous_attention_backward", mutates_args=())
def contiguous_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None,
    cu_q: Tensor | None, cu_k: Tensor | None, lengths: Tensor | None,
    num_keys: int, block: int, stride: int, window: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    layout = _layout(q, cu_q, cu_k, lengths, num_keys, block, stride)
    d_out = d_out.contiguous()
    with _serving(q, k, v, scale=scale):
        delta = rowsum_delta(out, d_out, d_lse)
        return contiguous_backward(as_rows(q), as_rows(k), as_rows(v), d_out, lse, delta, layout, window or None, scale)


@contiguous_attention_backward.register_fake
def _(q, k, v, *_):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _save_contiguous(ctx, inputs, output):
    q, k, v, *rest = inputs
    ctx.set_materialize_grads(False)  # lse is seldom part of a loss
    ctx.save_for_backward(q, k, v, *output, *rest[:3])
    ctx.rest = rest[3:]


def _contiguous_gradients(ctx, d_out, d_lse):
    q, k, v, out, lse, *lengths = ctx.saved_tensors
    d_out = torch.zeros_like(out) if d_out is None else d_out
    grads = contiguous_attention_backward(q, k, v, out, lse, d_out, d_lse, *lengths, *ctx.rest)
    return *grads, *[None] * 8


contiguous_attention.register_autograd(_contiguous_gradients, setup_context=_save_contiguous)


# ---- selection ---------------------------------------------------------------------------------------------


@torch.library.custom_op("nsa::select_top_blocks", mutates_args=())
def top_blocks(
    q: Tensor, k_cmp: Tensor, lse: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, lengths: Tensor | None,
    num_keys: int, sizes: list[int], scale: float,
) -> Tensor:  # fmt: skip
    config = _config(sizes)
    layout = _layout(q, cu_q, cu_k, lengths, num_keys, config.compress_block_size, config.compress_stride)
    with _serving(q, k_cmp, scale=scale):
        return select_top_blocks(as_rows(q), as_rows(k_cmp), lse.contiguous(), layout, config, scale)


@top_blocks.register_fake
def _(q, k_cmp, lse, cu_q, cu_k, lengths, num_keys, sizes, scale):
    return q.new_empty(q.shape[0], q.shape[1], k_cmp.shape[2], sizes[3], dtype=torch.int32)


# ---- selected attention ------------------------------------------------------------------------------------


@torch.library.custom_op("nsa::selected_attention", mutates_args=())
def selected_attention(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor,
    cu_q: Tensor | None, cu_k: Tensor | None, lengths: Tensor | None, sizes: list[int], scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    layout = _layout(q, cu_q, cu_k, lengths, k.shape[1], 1, 1)
    with _serving(q, k, v, scale=scale):
        return selected_forward(as_rows(q), as_rows(k), as_rows(v), block_indices, layout, _config(sizes), scale)


@selected_attention.register_fake
def _(q, k, v, block_indices, cu_q, cu_k, lengths, sizes, scale):
    return _like_out(q, v)


@torch.library.custom_op("nsa::selected_attention_backward", mutates_args=())
def selected_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, out: Tensor, lse: Tensor,
    d_out: Tensor, d_lse: Tensor | None,
    cu_q: Tensor | None, cu_k: Tensor | None, lengths: Tensor | None, sizes: list[int], scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    layout = _layout(q, cu_q, cu_k, lengths, k.shape[1], 1, 1)
    d_out = d_out.contiguous()
    with _serving(q, k, v, scale=scale):
        delta = rowsum_delta(out, d_out, d_lse)
        return selected_gradients(
            as_rows(q), as_rows(k), as_rows(v), block_indices, d_out, lse, delta, layout, _config(sizes), scale
        )


@selected_attention_backward.register_fake
def _(q, k, v, *_):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _save_selected(ctx, inputs, output):
    q, k, v, block_indices, *rest = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, block_indices, *output, *rest[:3])
    ctx.rest = rest[3:]


def _selected_gradients(ctx, d_out, d_lse):
    q, k, v, block_indices, out, lse, *lengths = ctx.saved_tensors
    d_out = torch.zeros_like(out) if d_out is None else d_out
    grads = selected_attention_backward(q, k, v, block_indices, out, lse, d_out, d_lse, *lengths, *ctx.rest)
    return *grads, *[None] * 6


selected_attention.register_autograd(_selected_gradients, setup_context=_save_selected)


# ---- the whole ---------------------------------------------------------------------------------------------


@torch.library.custom_op("nsa::native_sparse_attention", mutates_args=())
def whole(
    q: Tensor, keys: list[Tensor], gates: Tensor, lengths: list[Tensor | None],
    sizes: list[int], scale: float, nonnegative_gates: bool, max_keys: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """out; then what backward needs: the branches' outputs and log-sum-exps (cmp, slc, win), block_indices.

    keys: k and v of cmp, slc, win. lengths: cu_seqlens_q, cu_seqlens_k, seqlens_k, seqlens_win.

    An operator costs the host a third of a millisecond, so `kernels.functional` takes it only where it is traced.
    """
    config = _config(sizes)
    layouts = Layouts.of(q, Branches.of(config, keys, lengths), max_keys)
    with _serving(q, *keys, scale=scale):
        out, saved = attention_forward(q, pairs(keys), gates, layouts, config, scale)
    return out, *saved.tensors


@whole.register_fake
def _(q, keys, gates, lengths, sizes, *_):
    _, _, k, v, *_ = keys
    outs, lses = zip(*(_like_out(q, v) for _ in range(3)), strict=True)
    indices = q.new_empty(q.shape[0], q.shape[1], k.shape[2], sizes[3], dtype=torch.int32)
    return q.new_empty(*q.shape[:3], v.shape[3]), *outs, *lses, indices


@torch.library.custom_op("nsa::native_sparse_attention_backward", mutates_args=())
def whole_backward(
    q: Tensor, keys: list[Tensor], gates: Tensor, d_out: Tensor, saved: list[Tensor], lengths: list[Tensor | None],
    sizes: list[int], scale: float, nonnegative_gates: bool, max_keys: int,
) -> list[Tensor]:  # fmt: skip
    config = _config(sizes)
    layouts = Layouts.of(q, Branches.of(config, keys, lengths), max_keys)
    with _serving(q, *keys, scale=scale):
        rest = (layouts, config, scale, nonnegative_gates)
        return list(attention_backward(q, pairs(keys), gates, d_out, Saved.of(saved), *rest))


@whole_backward.register_fake
def _(q, keys, gates, *_):
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, *keys, gates)]


def _save_whole(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # only the first output has a gradient; three of the others are as large
    q, keys, gates, lengths, *ctx.rest = inputs
    ctx.save_for_backward(q, *keys, gates, *output[1:], *lengths)


def _whole_gradients(ctx, d_out, *_):
    q, *keys, gates = (tensors := ctx.saved_tensors)[:8]
    saved, lengths = list(tensors[8:15]), list(tensors[15:])
    dq, *d_keys, d_gates = whole_backward(q, keys, gates, d_out, saved, lengths, *ctx.rest)
    return dq, d_keys, d_gates, *[None] * 5


whole.register_autograd(_whole_gradients, setup_context=_save_whole)


# ---- any branch ----------------------------------------------------------------------------------------------


def attend(q: Tensor, stream: Stream, reach: Reach, scale: float) -> tuple[Tensor, Tensor]:
    """`nsa.ops.attend.attend`."""
    k, v, block, stride, where, num_tokens = stream
    lengths = on_device(where, q.device)
    if isinstance(reach, Blocks):
        only_the_third_matters = [1, 1, reach.size, 2, 1, 1, 1]
        return selected_attention(q, k, v, reach.indices, *lengths, only_the_third_matters, scale)
    window = reach.size if isinstance(reach, Window) else 0
    s = k.shape[1] if num_tokens is None else num_tokens
    return contiguous_attention(q, k, v, *lengths, s, block, stride, window, scale)
