"""Stage 1: each sparse layer beside the dense one, on the dense model's hidden states.

    loss = mean over layers of  |sparse_l(x_l) - dense_l(x_l)|^2 / |dense_l(x_l)|^2  +  weight * KL_l

x_l is what the dense model gives its layer l. KL_l is the divergence of the layer's block scores from the attention
that the dense layer pays to the blocks, both as distributions over the blocks that a query is free to choose; the mean
over `QUERIES` queries and the KV heads. Nothing is larger than QUERIES times the length.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nsa.config import NSAConfig
from nsa.modules.attention import NativeSparseAttention
from nsa.modules.token_layout import TokenLayout
from nsa.ops.selection import sum_into_blocks

QUERIES = 64  # of a row, evenly spread over its later half, whose blocks are compared
LEAST = 1e-6  # of a block's share: a score may be 0


def is_new(name: str) -> bool:
    """Whether a dense model has no parameter of this name."""
    return any(part in name for part in (".g_proj.", ".compress_k.", ".compress_v.", "_proj_cmp.", "_proj_win."))


def train_what_is_new(model: nn.Module) -> None:
    """Every other parameter stays as it is."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_new(name))


@contextmanager
def inputs_and_outputs(dense: Any, layers: list[int]) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """What the attention of these layers is given and gives, by layer, once the model was called in the block."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def listen(number: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            seen[number] = (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0], out[0])

        return dense.model.layers[number].self_attn.register_forward_hook(hook, with_kwargs=True)

    handles = [listen(number) for number in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def layer_loss(model: Any, dense: Any, ids: Int[Tensor, "b t"], blocks_weight: float) -> Float[Tensor, ""]:
    """The loss above of rows of token ids."""
    layers = model.config.sparse_layers
    with inputs_and_outputs(dense, layers) as seen, torch.no_grad():
        dense.model(input_ids=ids, use_cache=False)
    x = seen[layers[0]][0]
    layout = TokenLayout.of(x, model.model.rotary, model.config.nsa_config)
    total = x.new_zeros((), dtype=torch.float32)
    for number in layers:
        given, wanted = seen.pop(number)
        attention = model.model.layers[number].self_attn
        error = (attention(given, layout=layout)[0].float() - wanted.float()).square().sum()
        total = total + error / wanted.float().square().sum()
        if blocks_weight:
            total = total + blocks_weight * block_divergence(attention, given, layout)
    return total / len(layers)


def block_divergence(
    attention: NativeSparseAttention, x: Float[Tensor, "b t hidden"], layout: TokenLayout
) -> Float[Tensor, ""]:
    """KL of the scores of the free blocks from the dense attention that they get; 0 where no query has any."""
    config, t = attention.config, x.shape[1]
    first = (config.num_initial_blocks + config.num_local_blocks) * config.select_block_size
    if first >= t:
        return x.new_zeros((), dtype=torch.float32)
    positions = torch.linspace(max(first, t // 2), t - 1, min(QUERIES, t - first), device=x.device).long()
    q, tokens, _ = attention._inputs(x, layout.cos, layout.sin)
    k_cmp, _ = attention._compress(tokens.cmp, layout)
    q = q[:, positions].float() * q.shape[-1] ** -0.5
    last = torch.arange(k_cmp.shape[1], device=x.device) * config.compress_stride + config.compress_block_size - 1
    blocks = config.num_selection_blocks(t)
    with torch.no_grad():
        mass = _attended(q, tokens.slc.k, torch.arange(t, device=x.device) <= positions[:, None])
        mass = F.pad(mass, (0, blocks * config.select_block_size - t)).unflatten(-1, (blocks, -1)).sum(-1)
    scores = sum_into_blocks(_attended(q, k_cmp, last <= positions[:, None]), config)
    scores = F.pad(scores, (0, max(0, blocks - scores.shape[-1])))[..., :blocks]
    free = _free_blocks(positions, blocks, config)
    target, predicted = (_share(each, free) for each in (mass, scores))
    return (target * (target.clamp(min=LEAST).log() - predicted.clamp(min=LEAST).log())).sum(-1).mean()


def _attended(q: Tensor, k: Tensor, allowed: Tensor) -> Float[Tensor, "b g n s"]:
    """Softmax of scaled queries [b, n, h, d] over allowed keys [b, s, g, d], summed over the heads of a group."""
    b, n, h, d = q.shape
    groups = k.shape[2]
    scores = q.view(b, n, groups, h // groups, d).permute(0, 2, 3, 1, 4) @ k.float().permute(0, 2, 3, 1).unsqueeze(2)
    return scores.masked_fill(~allowed, -torch.inf).softmax(-1).sum(2)


def _free_blocks(positions: Tensor, blocks: int, config: NSAConfig) -> Tensor:
    """Which blocks a query may choose: neither forced nor after it."""
    own, block = (positions // config.select_block_size)[:, None], torch.arange(blocks, device=positions.device)
    return (block >= config.num_initial_blocks) & (block <= own - config.num_local_blocks)


def _share(each: Tensor, free: Tensor) -> Tensor:
    each = each * free
    return each / each.sum(-1, keepdim=True).clamp(min=LEAST)
