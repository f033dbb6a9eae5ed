"""The tests of this folder exist where a CUDA device does."""

import os

import torch

# cuBLAS repeats its sums only with a workspace of its own; torch.use_deterministic_algorithms asks for it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
