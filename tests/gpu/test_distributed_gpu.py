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
    return groups.run("distributed_cases", NSA_TEST_BACKEND="cpu:gloo,cuda:nccl", NCCL_NVLS_ENABLE="0")


@pytest.mark.parametrize("case", groups.cases_of(distributed_cases))
def test_two_gpus_are_one(results, case):
    assert results[case] == ""
