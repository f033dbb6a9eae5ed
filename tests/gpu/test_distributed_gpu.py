"""Two GPUs and NCCL: context parallelism and FSDP2 give what one GPU gives, and repeat their bits."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "distributed"))
import distributed_cases
import groups

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]


@pytest.fixture(scope="module")
def results():
    """All cases at once, each by two processes of its own: most of their time is the compilation of kernels.

    Whether there is a GPU is asked of NVML, for a process that has asked CUDA cannot fork others that use it.
    """
    environment = {"NCCL_NVLS_ENABLE": "0", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    return groups.run("distributed_cases", at_once=True, NSA_TEST_BACKEND="cpu:gloo,cuda:nccl", **environment)


@pytest.mark.parametrize("case", groups.cases_of(distributed_cases))
def test_two_gpus_are_one_and_repeat_their_bits(results, case):
    assert results[case] == ""
