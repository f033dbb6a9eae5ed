"""Tests for a GPU exist where a CUDA device does."""

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["*_gpu.py"]
