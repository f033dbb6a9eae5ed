"""`nsa bench`: what the kernels, a layer and a training step cost on a GPU, beside dense attention, in one run."""
