"""The loss of a language model without all of its logits in memory.

    loss = sum_i w_i (logsumexp(W h_i) - (W h_i)[y_i]) / count

over the labelled tokens i, whose hidden state is h_i and whose next token is y_i. Tokens come in chunks of at most
`CHUNK` logits. The gradient of a chunk, w_i (softmax(W h_i) - onehot(y_i)), is known as soon as its logits are, and
becomes its share of the gradients of h and W at once: logits are computed once and kept nowhere.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.loss.loss_utils import ForCausalLMLoss

CHUNK = 2**27  # logits that are in memory at once
IGNORED = -100  # a label that does not count


def lm_loss(
    hidden: Float[Tensor, "b t d"],
    head: Float[Tensor, "v d"],
    labels: Int[Tensor, "b t"] | None,
    *,
    weights: Float[Tensor, "b t"] | None = None,
    shift_labels: Int[Tensor, "b t"] | None = None,
    num_items_in_batch: Tensor | int | None = None,
) -> Float[Tensor, ""]:
    """transformers' loss of a causal language model, from hidden states.

    Args:
        hidden: after the last norm.
        head: the output embeddings, without a bias.
        labels: the tokens themselves; each is predicted by the hidden state before it. -100 does not count.
        weights: how much each label counts; by default 1.
        shift_labels: the labels already moved to the hidden states that predict them, in place of `labels`; weights
            are then theirs.
        num_items_in_batch: what the sum is divided by; by default the number of labelled tokens.

    Products are in the dtype of autocast, or of `hidden`; sums in fp32 (fp64 in fp64), the gradient of `head` too.
    Without a labelled token the mean is NaN, as everywhere in PyTorch.

    Raises:
        ValueError: neither labels nor shift_labels; shapes that do not fit.
    """
    targets, weights = _aligned(labels, weights, shift_labels)
    b, t, d = hidden.shape
    if targets.shape != (b, t) or head.shape[1] != d:
        raise ValueError(
            f"lm_loss: expected labels [{b}, {t}] and a head [v, {d}] for hidden states {list(hidden.shape)}, got "
            f"{list(targets.shape)} and {list(head.shape)}"
        )
    targets, weights, count = _counted(targets.to(hidden.device), weights, hidden.dtype)
    hidden, targets, weights = hidden.flatten(0, 1), targets.flatten(), weights.flatten()
    # A power of two and, where it does not divide, padding: under torch.compile the number of chunks then follows from
    # comparisons, so that it stays one graph as lengths change.
    chunks = 1
    while hidden.shape[0] * head.shape[0] > chunks * CHUNK and chunks < hidden.shape[0]:
        chunks *= 2
    missing = -hidden.shape[0] % chunks
    if missing:
        hidden, targets, weights = (
            F.pad(hidden, (0, 0, 0, missing)), F.pad(targets, (0, missing)), F.pad(weights, (0, missing)),
        )  # fmt: skip
    is_trained = torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad)
    flags = (hidden.requires_grad, head.requires_grad) if is_trained else (False, False)
    total = _Sum.apply(hidden, head, targets, weights, chunks, _dtype(hidden), *flags)
    return total / (count if num_items_in_batch is None else _on(num_items_in_batch, total))


class ChunkedLoss(nn.Module):
    """`lm_loss` as a part of a model that can be compiled by itself."""

    def forward(self, *args: Any, **kwargs: Any) -> Float[Tensor, ""]:
        return lm_loss(*args, **kwargs)


def lm_loss_of_logits(
    logits: Float[Tensor, "b t v"],
    labels: Int[Tensor, "b t"] | None,
    *,
    weights: Float[Tensor, "b t"] | None = None,
    shift_labels: Int[Tensor, "b t"] | None = None,
    num_items_in_batch: Tensor | int | None = None,
) -> Float[Tensor, ""]:
    """The same number where logits are wanted anyway."""
    logits = logits.to(_sums(logits.dtype))
    targets, weights, count = _counted(*_aligned(labels, weights, shift_labels), logits.dtype)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten().to(logits.device), reduction="none")
    total = (losses * weights.flatten()).sum()
    return total / (count if num_items_in_batch is None else _on(num_items_in_batch, total))


def takes_hidden_states(model: Any, arguments: dict[str, Any]) -> bool:
    """Whether `lm_loss` is this model's loss: transformers' own, of a head that is its weight and nothing more.

    Adapters, quantized or sharded weights, hooks and losses of the user's see logits, all of them.
    """
    head = model.lm_head
    return (
        type(head) is nn.Linear
        and head.bias is None
        and type(head.weight) is nn.Parameter
        and not (head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head))
        and model.loss_function is ForCausalLMLoss
        and "ignore_index" not in arguments
        and not getattr(model.config, "final_logit_softcapping", None)
    )


class _Sum(torch.autograd.Function):
    """sum_i w_i * loss_i over all chunks; the gradients are ready when the sum is."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        weights: Tensor,
        chunks: int,
        dtype: torch.dtype,
        needs_d_hidden: bool,
        needs_d_head: bool,
    ) -> Tensor:
        sums = _sums(dtype)
        head_low, classes = head.to(dtype), torch.arange(head.shape[0], device=head.device)
        total, d_hidden, d_head = hidden.new_zeros((), dtype=sums), [], None
        parts = (x.unflatten(0, (chunks, -1)).unbind() for x in (hidden, targets, weights))
        for h, y, w in zip(*parts, strict=True):
            h, y, w = h.to(dtype), y[:, None], w[:, None]
            p = F.log_softmax(h @ head_low.T, dim=-1, dtype=sums)
            total = total - (w * p.gather(1, y)).where(w != 0, 0).sum()
            if needs_d_hidden or needs_d_head:
                p = p.exp_().sub_((classes == y).to(sums)).mul_(w).to(dtype)
            if needs_d_hidden:
                d_hidden.append((p @ head_low).to(hidden.dtype))
            if needs_d_head:
                part = (p.T @ h).to(sums)
                d_head = part if d_head is None else d_head.add_(part)
        ctx.save_for_backward(torch.cat(d_hidden) if d_hidden else None, d_head)
        ctx.head_dtype = head.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor) -> Any:
        d_hidden, d_head = ctx.saved_tensors
        if d_hidden is not None:
            d_hidden = (d_total * d_hidden).to(d_hidden.dtype)
        if d_head is not None:
            d_head = (d_total * d_head).to(ctx.head_dtype)
        return d_hidden, d_head, None, None, None, None, None, None


def _aligned(
    labels: Tensor | None, weights: Tensor | None, shift_labels: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Labels and weights at the places whose hidden states predict them."""
    given = labels if shift_labels is None else shift_labels
    if given is None:
        raise ValueError("lm_loss: expected labels or shift_labels, got neither")
    if weights is not None and weights.shape != given.shape:
        raise ValueError(f"lm_loss: expected weights {list(given.shape)} as labels, got {list(weights.shape)}")
    if shift_labels is not None:
        return shift_labels, weights
    return F.pad(given[:, 1:], (0, 1), value=IGNORED), None if weights is None else F.pad(weights[:, 1:], (0, 1))


def _counted(targets: Tensor, weights: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Targets that can be looked up, weights that are 0 where no label is, and the number of labels."""
    is_labelled = targets != IGNORED
    ones = is_labelled.to(_sums(dtype))
    weights = ones if weights is None else weights.to(ones).where(is_labelled, 0)
    return targets.where(is_labelled, 0), weights, is_labelled.sum()


def _dtype(hidden: Tensor) -> torch.dtype:
    """What products are computed in."""
    device = hidden.device.type
    if hidden.dtype != torch.float64 and device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def _sums(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _on(count: Tensor | int, total: Tensor) -> Tensor | int:
    return count.to(total.device) if isinstance(count, Tensor) else count
