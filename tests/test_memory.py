"""Memory grows with t, not with t * s, and not with the steps of a run."""

import gc
import subprocess
import sys

import pytest
import tiny_llama
import torch

from nsa.methods.registry import TRAINED

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


@pytest.mark.parametrize("attention", TRAINED)
@pytest.mark.parametrize("length", [30, 90])  # the selected branch sees all of the first
def test_nothing_of_a_training_step_outlives_it(attention, length):
    model = tiny_llama.model(attention=attention).train()
    ids = torch.randint(0, model.config.vocab_size, (2, length))
    alive = []
    for _ in range(3):
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        gc.collect()
        alive.append(sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects()))
    assert alive[2] == alive[1]
