"""Native Sparse Attention (arXiv:2502.11089): exact, trainable, from the paper to generate().

Four names are the library: `NSAConfig` (the paper's symbols), `native_sparse_attention` (the function),
`NativeSparseAttention` (the layer) and `NSACache` (its decoding state). They are imported when first used,
so that `nsa --help` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nsa.cache import NSACache
    from nsa.config import NSAConfig
    from nsa.functional import native_sparse_attention
    from nsa.modules.attention import NativeSparseAttention

__version__ = "0.1.0.dev0"

__all__ = ["NSACache", "NSAConfig", "NativeSparseAttention", "native_sparse_attention"]

_HOME = {
    "NSACache": "nsa.cache",
    "NSAConfig": "nsa.config",
    "NativeSparseAttention": "nsa.modules.attention",
    "native_sparse_attention": "nsa.functional",
}


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'nsa' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
