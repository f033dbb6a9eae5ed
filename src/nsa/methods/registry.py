"""The trained methods by the names that a configuration's `attention` has; no torch is loaded.

Models, their configurations, plans, evaluation and benches read this table. What a method computes is its own file.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from nsa.config import InfLLMv2Config, NSAConfig
from nsa.costs.keys import DenseReads, InfLLMv2Reads, NSAReads, Reads, WindowReads

Attention = Literal["nsa", "infllm_v2", "dense", "window"]
SparseAttention = Literal["nsa", "infllm_v2"]


@dataclass(frozen=True)
class TrainedMethod:
    """What tells one method from another without running it.

    label: in tables.
    is_sparse: whether layers, caches and positions are this library's; else transformers' own with another mask.
    implementation: `attn_implementation`; a dense model takes transformers' others too.
    sizes: the field of a model's configuration that has its sizes.
    reads: of these sizes, which keys a query reads.
    """

    label: str
    is_sparse: bool
    implementation: str
    sizes: Literal["nsa", "infllm_v2"]
    reads: Callable[[Any], Reads]

    def sizes_of(self, config: Any) -> NSAConfig | InfLLMv2Config:
        """From the configuration of a model."""
        found: NSAConfig | InfLLMv2Config = getattr(config, f"{self.sizes}_config")
        return found


TRAINED: dict[str, TrainedMethod] = {
    "nsa": TrainedMethod("NSA", True, "nsa", "nsa", NSAReads),
    "infllm_v2": TrainedMethod("InfLLM-V2", True, "nsa", "infllm_v2", InfLLMv2Reads),
    "dense": TrainedMethod("dense", False, "nsa_dense", "nsa", lambda sizes: DenseReads()),
    "window": TrainedMethod("window", False, "nsa_window", "nsa", lambda sizes: WindowReads(sizes.window_size)),
}


def trained(config: Any) -> TrainedMethod:
    """That of a model's configuration."""
    return TRAINED[config.attention]
