"""Documents of different lengths in one row: nothing crosses a boundary."""

import torch

from nsa import NSAConfig, native_sparse_attention

lengths = [700, 1, 0, 1299]
cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
config = NSAConfig(window_size=128, num_selected_blocks=8)
q, k, v = torch.randn(1, 2000, 8, 64), torch.randn(1, 2000, 2, 64), torch.randn(1, 2000, 2, 32)  # v may be narrower
gates = torch.rand(1, 2000, 8, 3)  # compressed, selected, window

together = native_sparse_attention(q, k, v, gates, config, cu_seqlens_q=cu_seqlens)
alone = native_sparse_attention(q[:, 701:], k[:, 701:], v[:, 701:], gates[:, 701:], config)
print("largest difference, packed to alone:", (together[:, 701:] - alone).abs().max().item())
