"""Floating-point operations of training, counted from the sizes: what the share of a GPU's peak (MFU) is measured by.

A token costs 6 for every weight it is multiplied with (2 forward, 4 backward), and 12 H D for every key it attends to
(scores and output, 4 H D forward, twice that backward) in every layer. Weights are those of projections, gates, MLP and
head; phi's count 1 / d of a token's, one block being compressed every d tokens. What is computed twice to save memory
is not counted twice; the embedding, norms, rotation and the selection's sorting are not counted at all. InfLLM-V2's
pooled keys are scored forward only, by 2 H D: a sixth of a key each.
"""

import re
from collections.abc import Callable

from nsa.models import NSALlamaConfig

# bf16 with fp32 sums, dense, in 1e12 a second, from the makers' data sheets; the first name that fits.
PEAKS = {
    "B200": 2250, "H200": 989, "GH200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312,
    "L40S": 362, "L4": 121, "A10": 125, "RTX 5090": 209.5, "RTX 4090": 165.2, "RTX 3090": 71,
}  # fmt: skip


def peak_of(device_name: str) -> float | None:
    """Operations a second that the GPU of this name does at most; None for one that is not listed."""
    found = (peak for name, peak in PEAKS.items() if re.search(rf"\b{name}\b", device_name))
    return next((peak * 1e12 for peak in found), None)


def flops_per_token(config: NSALlamaConfig, keys: float) -> float:
    """Operations for one token, forward and backward, that attends to `keys` keys in every layer."""
    heads = config.num_attention_heads * config.head_dim
    attended = 12.0 * config.num_hidden_layers * heads * keys
    return 6.0 * weights_per_token(config) + attended


def weights_per_token(config: NSALlamaConfig) -> float:
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


def mean_keys(config: NSALlamaConfig) -> Callable[[int], float]:
    """Length of a sequence -> keys that its tokens attend to on average, compressed ones included."""
    nsa = config.nsa_config

    def window(length: int, size: int) -> float:
        """The mean of min(i, size) over i = 1 .. length."""
        full = min(length, size)
        return (full * (full + 1) / 2 + (length - full) * full) / length

    def compressed(length: int) -> float:
        whole, rest = divmod(max(0, length - nsa.compress_block_size + 1), nsa.compress_stride)
        return (nsa.compress_stride * whole * (whole + 1) / 2 + rest * (whole + 1)) / length

    def infllm_v2(length: int) -> float:
        """Those up to `sees_all` read everything; those after it n blocks, and the pooled keys to choose them."""
        every = min(length, config.infllm_v2_config.sees_all)
        blocks = (length - every) * nsa.num_selected_blocks * nsa.select_block_size
        pooled = length * compressed(length) - every * compressed(every)
        return (every * (every + 1) / 2 + blocks + pooled / 6) / length

    def keys(length: int) -> float:
        if config.attention == "infllm_v2":
            return infllm_v2(length)
        if config.attention == "dense":
            return (length + 1) / 2
        local = window(length, nsa.window_size)
        if config.attention == "window":
            return local
        return local + window(length, nsa.num_selected_blocks * nsa.select_block_size) + compressed(length)

    return keys
