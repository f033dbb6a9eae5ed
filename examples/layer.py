"""The layer in ten lines: a forward pass, a backward pass, and the same numbers from prefill and decoding."""

import torch

from nsa import NativeSparseAttention, NSACache, NSAConfig

attention = NativeSparseAttention(hidden_size=512, num_heads=16, num_kv_heads=2, head_dim=32)
x = torch.randn(1, 3000, 512)
y = attention(x)  # [1, 3000, 512]
y.square().mean().backward()

cache = NSACache(NSAConfig())
with torch.no_grad():
    prefill = attention(x[:, :2990], cache=cache)
    steps = [attention(x[:, i : i + 1], cache=cache) for i in range(2990, 3000)]
print("largest difference, decoded to whole:", (torch.cat([prefill, *steps], dim=1) - y).abs().max().item())
print("keys read by the last query:", NSAConfig().keys_per_query(3000), "of 3000;", cache.num_bytes(), "bytes cached")
