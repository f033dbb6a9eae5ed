"""One prompt, many continuations: rows of a paged cache share the pages of their common prefix."""

import torch

from nsa import NativeSparseAttention, NSAConfig
from nsa.cache import PagedNSACache

config = NSAConfig(window_size=128, num_selected_blocks=8)
attention = NativeSparseAttention(256, 8, 2, config=config)
prompt, x = torch.randn(1, 1500, 256), torch.randn(6, 20, 256)

cache = PagedNSACache(config, num_pages=40)  # of 256 tokens
with torch.no_grad():
    attention(prompt, cache=cache)
    print("the prompt:", cache.num_pages_used, "pages,", cache.num_bytes(), "bytes")
    cache.reorder(torch.zeros(6, dtype=torch.long))  # six rows of this one
    steps = [attention(x[:, i : i + 1], cache=cache) for i in range(20)]
    print("six continuations:", cache.num_pages_used, "pages,", cache.num_bytes(), "bytes")
    whole = attention(torch.cat([prompt.expand(6, -1, -1), x], dim=1))[:, 1500:]
print("largest difference, shared to separate:", (torch.cat(steps, dim=1) - whole).abs().max().item())
