"""Stage 2: the text's loss and the divergence from the dense model's predictions, without all logits in memory.

    loss = mean over labelled tokens of  CE(text, p)  +  weight * KL(q | p)

p is what the sparse model says of the next token y and q what the dense one says. The gradient of a token's logits,
(1 + weight) p - weight q - onehot(y), is known as soon as they are, and becomes its share of the gradients of the
hidden states and the head at once: logits are computed once and kept nowhere.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

LOGITS = 2**27  # in memory at once, of each model
Part = Callable[..., tuple[Tensor, Tensor, Tensor]]


def taught_loss(
    model: Any,
    dense: Any,
    ids: Int[Tensor, "b t"],
    weight: float,
    count: Tensor | int | None = None,
    part: Part | None = None,
) -> Float[Tensor, ""]:
    """The loss above; `count` is what the sum is divided by, the number of labels by default.

    `part` is `loss_of_part`, or what torch.compile made of it.
    """
    with torch.no_grad():
        wanted = dense.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    targets, heads = ids[:, 1:].flatten(), (model.lm_head.weight, dense.lm_head.weight)
    caps = tuple(getattr(one.config, "final_logit_softcapping", None) for one in (model, dense))
    total = _Sum.apply(hidden, heads[0], wanted, heads[1], targets, weight, caps, part or loss_of_part)
    return total / (targets.numel() if count is None else count)


def loss_of_part(
    h: Float[Tensor, "n d"],
    head: Float[Tensor, "v d"],
    wanted: Float[Tensor, "n e"],
    their_head: Float[Tensor, "v e"],
    y: Int[Tensor, " n"],
    weight: float,
    caps: tuple[float | None, float | None],
) -> tuple[Float[Tensor, ""], Float[Tensor, "n d"], Float[Tensor, "v d"]]:
    """The sum of some tokens' losses, and its gradients for h and the head."""
    said, theirs = _logits(h, head, caps[0]), _logits(wanted, their_head, caps[1])
    log_p, log_q = said.log_softmax(-1), theirs.log_softmax(-1)
    q, y = log_q.exp(), y[:, None]
    total = weight * (q * (log_q - log_p)).sum() - log_p.gather(1, y).sum()
    is_y = y == torch.arange(head.shape[0], device=y.device)
    d_said = (1 + weight) * log_p.exp() - weight * q - is_y.to(q.dtype)
    if caps[0] is not None:
        d_said = d_said * (1 - (said / caps[0]).square())
    d_said = d_said.to(h.dtype)
    return total, d_said @ head, (d_said.T @ h).float()


def _logits(h: Tensor, head: Tensor, cap: float | None) -> Tensor:
    logits = (h @ head.T).float()
    return logits if cap is None else cap * torch.tanh(logits / cap)


class _Sum(torch.autograd.Function):
    """The sum over all tokens; the gradients are ready when the sum is."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        wanted: Tensor,
        their_head: Tensor,
        targets: Tensor,
        weight: float,
        caps: tuple[float | None, float | None],
        part: Part,
    ) -> Tensor:
        dtype, ctx.dtypes = _dtype(hidden), (hidden.dtype, head.dtype)
        rows, total = max(1, LOGITS // head.shape[0]), hidden.new_zeros((), dtype=torch.float32)
        d_hidden, d_head = [], None
        heads = head.detach().to(dtype), their_head.detach().to(dtype)
        for h, w, y in zip(hidden.split(rows), wanted.split(rows), targets.split(rows), strict=True):
            one, d_h, d_w = part(h.to(dtype), heads[0], w.to(dtype), heads[1], y, weight, caps)
            total = total + one
            d_hidden.append(d_h)
            if ctx.needs_input_grad[1]:
                d_head = d_w if d_head is None else d_head.add_(d_w)
        ctx.save_for_backward(torch.cat(d_hidden), d_head)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor) -> Any:
        d_hidden, d_head = ctx.saved_tensors
        of_hidden, of_head = ctx.dtypes
        d_head = None if d_head is None else (d_total * d_head).to(of_head)
        return (d_total * d_hidden).to(of_hidden), d_head, None, None, None, None, None, None


def _dtype(hidden: Tensor) -> torch.dtype:
    """What products are computed in."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
