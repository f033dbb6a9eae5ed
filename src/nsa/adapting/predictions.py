"""Stage 2: the text's loss and the divergence from the dense model's predictions, without all logits in memory.

loss = mean over labelled tokens of  CE(text, sparse)  +  weight * KL(dense | sparse)
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LOGITS = 2**25  # in memory at once, of each model


def taught_loss(
    model: Any, dense: Any, ids: Int[Tensor, "b t"], weight: float, count: Tensor | int | None = None
) -> Float[Tensor, ""]:
    """The loss above; `count` is what the sum is divided by, the number of labels by default."""
    with torch.no_grad():
        wanted = dense.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    targets = ids[:, 1:].flatten()
    rows = max(1, LOGITS // model.config.vocab_size)
    total = hidden.new_zeros((), dtype=torch.float32)
    for h, w, y in zip(hidden.split(rows), wanted.split(rows), targets.split(rows), strict=True):
        total = total + checkpoint(_part, model, dense, h, w, y, weight, use_reentrant=False)
    return total / (targets.numel() if count is None else count)


def _part(model: Any, dense: Any, h: Tensor, wanted: Tensor, y: Tensor, weight: float) -> Tensor:
    said = F.log_softmax(_logits(model, h), dim=-1)
    with torch.no_grad():
        theirs = F.log_softmax(_logits(dense, wanted), dim=-1)
    return F.nll_loss(said, y, reduction="sum") + weight * F.kl_div(said, theirs, reduction="sum", log_target=True)


def _logits(model: Any, h: Tensor) -> Tensor:
    logits = model.lm_head(h).float()
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)
