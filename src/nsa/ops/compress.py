"""Compression: every block of l tokens becomes one key and one value (paper, eq. 7).

phi maps a block to a vector. Three are given: the mean, a linear map, and the mean plus an MLP that knows the place
of each token in its block. The weights are shared by the KV heads.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nsa.config import NSAConfig
from nsa.ops.packed_blocks import PackedBlocks
from nsa.shapes import UNIFORM, Sequences, bind

Phi = Callable[[Float[Tensor, "*blocks l d"]], Float[Tensor, "*blocks d"]]


def compress(
    x: Float[Tensor, "b s g d"],
    phi: Phi,
    config: NSAConfig,
    *,
    sequences: Sequences = UNIFORM,
) -> Float[Tensor, "b c g d"]:
    """Compressed keys or values of whole sequences.

        x_cmp[i] = phi(x[i*d : i*d + l]) for the blocks that lie wholly inside the sequence

    Args:
        x: raw keys (before rotary) or values.
        phi: maps blocks [..., l, d] to [..., d].
        config: gives l and d.
        sequences: where the sequences lie; for packed ones blocks never cross a boundary and the blocks of one
            sequence follow those of the one before it. Ragged rows are compressed to the width of x; what is past a
            row's length is not seen by its queries.

    Returns:
        x_cmp, c = (s - l) // d + 1 blocks a sequence, none if it is shorter than l. For packed sequences, whose
        lengths are not read on the host, c = s // d, as many as there can be; those past the last are phi of zeros,
        and nobody sees them.

    Raises:
        ValueError: x is not [b, s, g, d], or lengths that do not fit it.

    Source: paper eq. 7. Tested against the fp64 brute force of nsa.testing.
    """
    b, s, _, _ = bind("compress", x=(x, "b s g d")).values()
    if not sequences.is_packed:
        return phi(blocks_of(x, config))
    # Queries play no part here: each sequence is given by its keys.
    cu_seqlens = sequences.cu_seqlens_q if sequences.cu_seqlens_k is None else sequences.cu_seqlens_k
    assert cu_seqlens is not None
    if b != 1:
        raise ValueError(f"compress: packed sequences should come with b = 1, got b = {b}")
    return phi(PackedBlocks.of(cu_seqlens.to(x.device), s, config).gather(x))


def phi_mean(blocks: Float[Tensor, "*blocks l d"]) -> Float[Tensor, "*blocks d"]:
    """The mean over the tokens of the block."""
    return blocks.mean(-2)


def phi_linear(blocks: Float[Tensor, "*blocks l d"], weight: Float[Tensor, "d ld"]) -> Float[Tensor, "*blocks d"]:
    """weight @ flatten(block)."""
    return F.linear(blocks.flatten(-2), weight)


def phi_mlp(
    blocks: Float[Tensor, "*blocks l d"],
    position_encoding: Float[Tensor, "l d"],
    weight_in: Float[Tensor, "m ld"],
    bias_in: Float[Tensor, " m"],
    weight_out: Float[Tensor, "d m"],
    bias_out: Float[Tensor, " d"],
) -> Float[Tensor, "*blocks d"]:
    """mean(block) + MLP(flatten(block + position encoding)), one hidden layer with GELU."""
    # W (x + p) = W x + W p: the encoding is added once, not to every block.
    bias = bias_in + weight_in @ position_encoding.flatten()
    hidden = F.gelu(F.linear(blocks.flatten(-2), weight_in, bias))
    return blocks.mean(-2) + F.linear(hidden, weight_out, bias_out)


# By the names of `NSAConfig.compression`: called with the blocks, then phi's weights.
PHI: dict[str, Callable[..., Tensor]] = {"mean": phi_mean, "linear": phi_linear, "mlp": phi_mlp}


def blocks_of(x: Tensor, config: NSAConfig) -> Tensor:
    """[b, s, g, d] -> [b, c, g, l, d]; put together from strides, for the backward of `unfold` is many times slower."""
    count, stride = config.num_compressed_blocks(x.shape[1]), config.compress_stride
    per_block = config.compress_block_size // stride
    if count == 0:
        return x.new_empty(x.shape[0], 0, x.shape[2], config.compress_block_size, x.shape[3])
    strides = count + per_block - 1
    x = x[:, : strides * stride].unflatten(1, (strides, stride)).transpose(2, 3)
    return torch.cat([x[:, first : first + count] for first in range(per_block)], dim=3)
