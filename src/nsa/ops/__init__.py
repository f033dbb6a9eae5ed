"""The steps of the paper, one file each: the PyTorch meaning of every operation, on any device and dtype.

compress -> compressed_attention -> selection -> selected_attention -> window_attention -> combine;
`nsa.functional` calls them in this order. The three that attend only say which keys each query sees, as tiles;
`tiled_attention` does the rest for all of them. `causal_attention` is what a branch is that sees all of the past.
"""
