"""A layer's step over block tables on a GPU: decoding rows and chunks of prefill on the kernels, beside fp64."""

import random

import pytest
import torch
from poison import poisoned_memory
from serving.engine import CONFIG, Engine, Row, Text, variants
from serving.fixed import Fixed

from nsa.backend import use_backend
from nsa.config import NSAConfig
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


def captured(fixed: Fixed) -> torch.cuda.CUDAGraph:
    """The step as a graph, captured while all rows are padding, as an engine does before its first request."""
    fixed.fill([])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        fixed.run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fixed.run()
    return graph


PAPER = NSAConfig(num_selected_blocks=4, window_size=100)


def decoded(config: NSAConfig, dtype: torch.dtype, t: int, is_graph: bool) -> list[Row]:
    """Rows that begin anywhere, come and go, and one that is put back: always the same graph, if it is one."""
    size, starts = (256, (0, 15, 240)) if config is PAPER else (16, (0, 3, 50))
    rows = [Row(Text(start + 4 * t, config, seed=start)) for start in starts]
    engine = Engine(config, size=size, num_blocks=64, dtype=dtype, device="cuda")

    def prefill(row: Row, count: int) -> None:
        with use_backend("torch"):
            engine.step([(row, count)])

    fixed = Fixed(engine, 5, t, 10, rows[0].text.phi, spare=3)
    run = captured(fixed).replay if is_graph else fixed.run
    with use_backend("auto" if is_graph else "torch"):
        for row, start in zip(rows, starts, strict=True):
            if start:
                prefill(row, start)
        for order in (rows, rows[::-1], rows[:1], rows[1:]):
            fixed.step(order, run)
        engine.drop(rows[2])  # preempted: its blocks go to others, and it gets other ones
        prefill(rows[0], t)
        prefill(rows[2], starts[2] + t)
        for _ in range(3):
            fixed.step(rows[2:], run)
        fixed.step(rows[1:2], run)
    return rows


@pytest.mark.parametrize("config", [*variants(), PAPER], ids=lambda c: f"{c.compression}-w{c.window_size}")
@pytest.mark.parametrize(("dtype", "t"), [(torch.float32, 1), (torch.float32, 16), (torch.bfloat16, 5)], ids=str)
def test_one_graph_decodes_whatever_its_tables_say(config, dtype, t, monkeypatch):
    poisoned_memory(monkeypatch)
    found, plain = (decoded(config, dtype, t, is_graph) for is_graph in (True, False))
    for row, other in zip(found, plain, strict=True):
        assert row.computed == row.text.length
        actual, reference = (torch.stack(x.out) for x in (row, other))
        assert_close_to_fp64(actual, reference, row.text.truth(), largest_score=20.0)
