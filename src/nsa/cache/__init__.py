"""What decoding has to remember of one layer, in three layouts behind one interface (`LayerCache`).

    NSACache         growing   memory as tokens come; any number of rows and tokens; the default
    StaticNSACache   static    memory for a fixed number of tokens a row, at fixed addresses: CUDA graphs, torch.compile
    PagedNSACache    paged     fixed addresses too, in pages that rows may share: prompts with a common prefix, beams

`convert` moves what one cache remembers into another of any layout.
"""

from nsa.cache.fixed import FixedNSACache
from nsa.cache.growing import NSACache
from nsa.cache.layer import CacheContents, CacheViews, CompressRun, LayerCache, convert
from nsa.cache.paged import PagedNSACache
from nsa.cache.static import StaticNSACache

__all__ = [
    "CacheContents",
    "CacheViews",
    "CompressRun",
    "FixedNSACache",
    "LayerCache",
    "NSACache",
    "PagedNSACache",
    "StaticNSACache",
    "convert",
]
