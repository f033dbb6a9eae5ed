"""The layer of these tests: in fp64, with gates and phi away from where they start."""

import torch
from moved import moved

from nsa import NativeSparseAttention, NSAConfig
from nsa.cache import LayerCache

CONFIG = NSAConfig(compress_block_size=8, compress_stride=4, select_block_size=8, num_selected_blocks=4, window_size=10)


def layer(config: NSAConfig = CONFIG, **kwargs) -> NativeSparseAttention:
    torch.manual_seed(0)
    return moved(NativeSparseAttention(24, 4, 2, 6, 10, config, **kwargs).double(), 0.3)


def in_chunks(
    attention: NativeSparseAttention,
    x: torch.Tensor,
    chunks: list[int],
    cache: LayerCache,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Small chunks are decoding steps of a static or paged cache, once it has memory."""
    outs, done = [], 0
    for chunk in chunks:
        upto = None if mask is None else mask[:, : done + chunk]
        outs.append(attention(x[:, done : done + chunk], cache=cache, attention_mask=upto))
        done += chunk
    return torch.cat(outs, dim=1)
