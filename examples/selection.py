"""Which blocks do queries select? The scores of the blocks, and the choice, as the layer sees them."""

import torch

from nsa import NativeSparseAttention, NSAConfig

config = NSAConfig(select_block_size=32, num_selected_blocks=6, window_size=64)
attention = NativeSparseAttention(128, 4, 2, config=config)
block_scores, block_indices = attention.select(torch.randn(1, 600, 128))
print("scores of the blocks, last query, first KV head:", block_scores[0, -1, 0].round(decimals=3).tolist())
print("selected (first and last two are forced):", block_indices[0, -1, 0].tolist())
