"""Stage 1: each sparse layer beside the dense one, on the dense model's hidden states.

    loss = mean over layers of  |sparse_l(x_l) - dense_l(x_l)|^2 / |dense_l(x_l)|^2  +  weight * KL_l

x_l is what the dense model gives its layer l. KL_l is the divergence of the layer's block scores from the attention
that the dense layer pays to the blocks (`nsa.modules.selector_loss`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nsa.modules.selector_loss import selector_loss
from nsa.modules.token_layout import TokenLayout


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
            q, tokens, _ = attention._inputs(given, layout.cos, layout.sin)
            k_cmp, _ = attention._compress(tokens.cmp, layout)
            queries = attention.selector_queries
            divergence = selector_loss(q, tokens.slc.k, k_cmp, layout, attention.config, queries)
            total = total + blocks_weight * divergence
    return total / len(layers)
