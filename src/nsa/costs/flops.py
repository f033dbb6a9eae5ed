"""Floating-point operations, counted from the sizes: of one attention, and of a model's training (for the MFU).

A product is one multiply-add for each element of a head's width and each (query, key) pair of a head. Forward needs
two a pair (q k^T and p v), backward five (q k^T again, dO v^T, dq, dk, dv); the importance of blocks needs none of its
own where it comes out of the compressed branch's pass, and one more (q k^T) where it takes a pass by itself.

In training a token costs 6 for every weight it is multiplied with (2 forward, 4 backward), and 12 H D for every key it
attends to (scores and output, 4 H D forward, twice that backward) in every layer. Weights are those of projections,
gates, MLP and head; phi's count 1 / d of a token's, one block being compressed every d tokens. What is computed twice
to save memory is not counted twice; the embedding, norms, rotation, the selection's sorting and the selector's own loss
(`nsa train --selector-loss`) are not counted at all. Where every query selects all blocks, all blocks are counted.
InfLLM-V2's pooled keys are scored forward only, by 2 H D: a sixth of a key each.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nsa.config import NSAConfig
from nsa.costs.keys import dense_pairs, pairs
from nsa.methods.registry import trained

# ---- one attention ----


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One sequence of `length` tokens; h query heads in groups over g KV heads of widths d (keys) and e (values)."""

    length: int
    h: int = 64
    g: int = 4
    d: int = 128
    e: int = 128


def forward_flops(shape: Shape, seen: int, *, keys: int = 1, values: int = 1) -> int:
    """FLOPs of `keys` products over the width d and `values` over e, for pairs `seen` by each head."""
    return 2 * shape.h * seen * (keys * shape.d + values * shape.e)


def backward_flops(shape: Shape, seen: int) -> int:
    """Five products: q k^T, dq and dk over the width d, dO v^T and dv over e."""
    return forward_flops(shape, seen, keys=3, values=2)


def limit_flops(shape: Shape, config: NSAConfig) -> dict[str, int]:
    """The least that NSA and dense attention compute, forward and backward."""
    sparse, dense = pairs(shape.length, config).total, dense_pairs(shape.length)
    return {
        "forward": forward_flops(shape, sparse),
        "backward": backward_flops(shape, sparse),
        "dense forward": forward_flops(shape, dense),
        "dense backward": backward_flops(shape, dense),
    }


def kernel_flops(shape: Shape, config: NSAConfig) -> dict[str, int]:
    """The least of each kernel that `nsa bench kernels` times alone and that multiplies matrices."""
    seen = pairs(shape.length, config)
    return {
        "forward: compressed": forward_flops(shape, seen.compressed),
        "forward: selection": forward_flops(shape, seen.compressed, values=0),
        "forward: selected": forward_flops(shape, seen.selected),
        "forward: window": forward_flops(shape, seen.window),
        "backward: compressed": backward_flops(shape, seen.compressed),
        "backward: window": backward_flops(shape, seen.window),
        # Groups of few heads have one kernel; elsewhere two without atomics recompute the scores and dO v^T: 3 products
        # and 4.
        "backward: selected": backward_flops(shape, seen.selected),
        "backward: selected dq": forward_flops(shape, seen.selected, keys=2, values=1),
        "backward: selected dk, dv": forward_flops(shape, seen.selected, keys=2, values=2),
    }


# ---- a model's training ----


def flops_per_token(config: Any, keys: float) -> float:
    """Operations for one token of the model of an NSALlamaConfig, which attends to `keys` keys in every layer."""
    heads = config.num_attention_heads * config.head_dim
    attended = 12.0 * config.num_hidden_layers * heads * keys
    return 6.0 * weights_per_token(config) + attended


def weights_per_token(config: Any) -> float:
    """Weights that a token is multiplied with."""
    hidden, heads, groups, dim = (
        config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim,
    )  # fmt: skip
    nsa = config.nsa_config
    layer = 2.0 * hidden * heads * dim + 3.0 * hidden * config.intermediate_size
    branches = 3 if config.attention == "nsa" and not nsa.shared_kv else 1
    layer += 2.0 * branches * hidden * groups * dim
    if config.attention == "nsa":
        block = nsa.compress_block_size * dim
        phi = {"mlp": (block + dim) * 2 * dim, "linear": block * dim, "mean": 0}[nsa.compression]
        layer += 3.0 * hidden * heads + 2.0 * groups * phi / nsa.compress_stride
    return config.num_hidden_layers * layer + hidden * config.vocab_size


def mean_keys(config: Any, all_blocks_of: int = 0) -> Callable[[int], float]:
    """Length of a sequence -> keys that its tokens attend to on average, one that is only scored as a sixth.

    all_blocks_of: where it is above 0, all blocks of so many tokens are selected.
    """
    method = trained(config)
    sizes = method.sizes_of(config)
    reads = method.reads(sizes.with_all_blocks(all_blocks_of) if all_blocks_of else sizes)

    def keys(length: int) -> float:
        read = reads.every(length)
        return (read.attended + read.scored / 6) / length

    return keys
