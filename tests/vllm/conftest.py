"""Tests of serving on vLLM, in an environment of their own (`make test-vllm`); where vLLM is missing there are none."""

import importlib.util
import os

import pytest

if importlib.util.find_spec("vllm.config") is None:  # this folder has its name too
    collect_ignore_glob = ["*"]
else:
    # In one process, so that a test may look at the pool; one thread for the tiny model.
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", OMP_NUM_THREADS="1", VLLM_NO_USAGE_STATS="1")


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Tiny models of each kind, saved by save_pretrained with a tokenizer."""
    from vllm_models import save

    root = tmp_path_factory.mktemp("models")
    return {attention: save(root / attention, attention) for attention in ("nsa", "dense", "window")}
