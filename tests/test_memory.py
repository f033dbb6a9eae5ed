"""Memory grows with t, not with t * s."""

import subprocess
import sys

FORWARD_AND_BACKWARD = """
import resource
import torch
from nsa import NSAConfig, native_sparse_attention

torch.set_num_threads(1)
shapes = ((8, 64), (1, 64), (1, 64), (8, 3))  # q, k, v, gates
inputs = [torch.rand(1, {length}, heads, dim, requires_grad=True) for heads, dim in shapes]
torch.autograd.grad(native_sparse_attention(*inputs, NSAConfig()).sum(), inputs)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def test_an_eighth_of_64k_tokens_takes_less_than_an_eighth_of_16_gib():
    """The whole process, torch's own half a GiB included. The scores alone would be 2 GiB for each branch."""
    script = FORWARD_AND_BACKWARD.format(length=8192)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 16 * 2**30 / 8
