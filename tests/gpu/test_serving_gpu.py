"""A layer's step over block tables on a GPU: decoding rows and chunks of prefill on the kernels, beside fp64."""

import random

import pytest
import torch
from serving.engine import CONFIG, Engine, Row, Text, variants

from nsa.backend import use_backend
from nsa.testing import assert_close_to_fp64

pytestmark = pytest.mark.gpu


def run(config, dtype, backend, seed):
    """Rows of several lengths in steps of all sizes, on this backend."""
    draw = random.Random(seed)
    rows = [Row(Text(length, config, seed=length)) for length in (70, 33, 9)]
    engine = Engine(config, num_blocks=64, dtype=dtype, device="cuda")
    with use_backend(backend):
        while any(row.computed < row.text.length for row in rows):
            work = [(row, min(draw.choice([0, 1, 1, 2, 17, 30]), row.text.length - row.computed)) for row in rows]
            engine.step(work, padding=draw.choice([0, 2]))
    return rows


@pytest.mark.parametrize("config", variants(), ids=lambda c: f"{c.compression}-w{c.window_size}")
def test_fp32_is_within_the_budget_of_the_paper_in_loops(config):
    for seed in range(3):
        found, plain = (run(config, torch.float32, backend, seed) for backend in ("auto", "torch"))
        for row, other in zip(found, plain, strict=True):
            actual, reference = (torch.stack(x.out) for x in (row, other))
            assert_close_to_fp64(actual, reference, row.text.truth(), largest_score=20.0)


def test_the_kernels_are_what_auto_takes(monkeypatch):
    from nsa.kernels import decode

    calls = []
    real = decode.decode_attention
    monkeypatch.setattr(decode, "decode_attention", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    run(CONFIG, torch.float32, "auto", 0)
    assert calls
