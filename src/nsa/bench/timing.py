"""Times on the device, candidates in turn."""

import statistics
from collections.abc import Callable, Mapping

import torch

Candidates = Mapping[str, Callable[[], object]]


def require_cuda() -> None:
    """ValueError in one line where there is nothing to measure."""
    if not torch.cuda.is_available():
        raise ValueError("nsa bench measures a CUDA device, and PyTorch sees none here")


def interleaved(candidates: Candidates, repetitions: int) -> dict[str, float]:
    """Median milliseconds of each candidate.

    Every repetition runs all candidates once, in turn, so that a drifting clock meets them all. A first round, not
    counted, compiles and warms.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for repetition in range(repetitions + 1):
        for name, run in candidates.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            if repetition:
                times[name].append(start.elapsed_time(end))
    return {name: statistics.median(found) for name, found in times.items()}


def peak_gib(run: Callable[[], object]) -> float:
    """GiB that it takes at its worst moment, on top of what lay there before (inputs, weights)."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def matrix_rate(size: int = 8192, repetitions: int = 10) -> float:
    """FLOP/s of a large bf16 matrix product through the library at hand, on random numbers."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    ms = interleaved({"product": lambda: a @ b}, repetitions)["product"]
    return 2 * size**3 / (ms / 1e3)


def device_facts() -> dict[str, str]:
    """What a reader of the numbers has to know."""
    import triton

    return {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
