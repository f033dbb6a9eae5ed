"""Times candidates for the launch table (`nsa.kernels.launch.TABLE`), one kernel's tile changed at a time.

    python benchmarks/tune_kernels.py --length 65536

Compiling takes longer than timing. Several processes fill Triton's cache faster, each with a share of the candidates at
a short length (lengths are no part of the key), before one process alone does the timing:

    for i in 0 1 2 3 4 5 6 7; do python benchmarks/tune_kernels.py --length 1024 --share $i/8 & done; wait
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from nsa.bench.candidates import Problem
from nsa.bench.kernels import single_kernels
from nsa.bench.timing import interleaved
from nsa.config import NSAConfig
from nsa.costs.flops import Shape
from nsa.kernels import hopper, launch

# Rows (queries x heads), keys, warps, stages.
CANDIDATES: dict[str, list[launch.Candidate]] = {
    "contiguous_forward": [(128, 128, 8, 3), (128, 64, 8, 3), (64, 64, 4, 3), (64, 64, 4, 2), (64, 128, 4, 2)],
    "window_forward": [(128, 64, 8, 3), (64, 64, 4, 3), (64, 64, 4, 2), (64, 128, 4, 2)],
    "contiguous_dq": [
        (128, 64, 8, 3),
        (128, 64, 8, 2),
        (64, 64, 8, 2),
        (64, 64, 4, 2),
        (64, 32, 4, 3),
        (128, 128, 8, 2),
    ],
    "window_dq": [(128, 64, 8, 3), (64, 64, 4, 2), (64, 32, 4, 3), (64, 32, 4, 2)],
    "contiguous_dkdv": [
        (64, 128, 8, 3),
        (32, 128, 8, 3),
        (64, 128, 8, 2),
        (64, 64, 4, 2),
        (64, 64, 8, 2),
        (32, 64, 4, 3),
    ],
    "window_dkdv": [(64, 128, 8, 3), (32, 128, 8, 3), (64, 64, 4, 2), (32, 64, 4, 3)],
    "scoring": [(64, 128, 4, 3), (64, 128, 4, 2), (128, 128, 8, 3), (128, 64, 4, 3), (64, 256, 8, 3)],
    "selected_forward": [(64, 64, 4, 3), (64, 64, 4, 2), (32, 64, 4, 3), (16, 64, 2, 3), (64, 32, 4, 3)],
    "selected_dq": [(64, 64, 4, 2), (64, 64, 4, 3), (32, 64, 4, 2), (16, 64, 4, 2), (64, 32, 4, 2)],
    "selected_dkdv": [(64, 64, 4, 2), (32, 64, 4, 3), (32, 64, 4, 2), (64, 64, 8, 2), (64, 64, 8, 3), (32, 64, 8, 2)],
    "hopper.ATTENTION": [(64, 64, 4, 3), (64, 64, 4, 2), (128, 64, 8, 3)],
    "hopper.SCORING": [(64, 128, 4, 3), (64, 128, 4, 4), (128, 128, 8, 3)],
}
# The launchers that a kernel's tile matters to.
TIMED = {
    "contiguous_forward": ("forward: compressed",),
    "window_forward": ("forward: window",),
    "contiguous_dq": ("backward: compressed",),
    "window_dq": ("backward: window",),
    "contiguous_dkdv": ("backward: compressed",),
    "window_dkdv": ("backward: window",),
    "scoring": ("forward: selection",),
    "selected_forward": ("forward: selected",),
    "selected_dq": ("backward: selected dq",),
    "selected_dkdv": ("backward: selected dk, dv",),
    "hopper.ATTENTION": ("forward: compressed", "forward: selected"),
    "hopper.SCORING": ("forward: selection",),
}


@contextmanager
def in_use(kernel: str, candidate: launch.Candidate) -> Iterator[None]:
    """One candidate and no other; candidates of plain Triton kernels are timed on Hopper too."""
    is_hopper, table = launch.is_hopper, dict(launch.TABLE)
    attention, scoring = hopper.ATTENTION, hopper.SCORING
    if kernel.startswith("hopper."):
        setattr(hopper, kernel.removeprefix("hopper."), candidate)
    else:
        launch.is_hopper = lambda device: False
        launch.TABLE[kernel] = [(launch.TABLE[kernel][-1][0], candidate)]
    launch.choose.cache_clear()
    try:
        yield
    finally:
        launch.choose.cache_clear()
        launch.is_hopper = is_hopper
        launch.TABLE.update(table)
        hopper.ATTENTION, hopper.SCORING = attention, scoring


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=65536)
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--value-dim", type=int, help="by default the head dim; the paper's are 192 and 128")
    parser.add_argument("--correlated", action="store_true", help="queries that resemble their neighbours")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--share", default="0/1", help="i/n: only every n-th candidate, from the i-th on")
    arguments = parser.parse_args()
    first, step = map(int, arguments.share.split("/"))
    shape = Shape(
        length=arguments.length, h=arguments.heads, g=arguments.kv_heads,
        d=arguments.head_dim, e=arguments.value_dim or arguments.head_dim,
    )  # fmt: skip
    launchers = single_kernels(Problem(shape, NSAConfig(), correlated=arguments.correlated, dtype=torch.bfloat16))
    print(f"{torch.cuda.get_device_name()}, {arguments.length} tokens", flush=True)
    todo = [(kernel, candidate) for kernel, candidates in CANDIDATES.items() for candidate in candidates]
    for kernel, candidate in todo[first::step]:
        if kernel.startswith("hopper.") and torch.cuda.get_device_capability()[0] != 9:
            continue
        with in_use(kernel, candidate):
            try:
                times = interleaved({name: launchers[name] for name in TIMED[kernel]}, arguments.repetitions)
                found = ", ".join(f"{name} {ms:.2f} ms" for name, ms in times.items())
            except Exception as error:  # a candidate that does not fit is a result too
                found = f"{type(error).__name__}: {str(error)[:100]}"
        print(f"{kernel} {candidate}: {found}", flush=True)


if __name__ == "__main__":
    main()
