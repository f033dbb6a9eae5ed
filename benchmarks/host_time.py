"""How long the host takes to launch the function, whatever the device then does: milliseconds forward and backward.

    python benchmarks/host_time.py --heads 16 --kv-heads 1 --head-dim 64

Tokens are few, so that the device keeps up; it is waited for outside of what is timed.
"""

import argparse
import statistics
import time

import torch

from nsa.bench.candidates import Problem
from nsa.config import NSAConfig
from nsa.costs.flops import Shape


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("length", 512),
        ("heads", 16),
        ("kv-heads", 1),
        ("head-dim", 64),
        ("value-dim", 64),
        ("repetitions", 200),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    a = parser.parse_args()
    shape = Shape(length=a.length, h=a.heads, g=a.kv_heads, d=a.head_dim, e=a.value_dim)
    nsa = Problem(shape, NSAConfig(), correlated=False, dtype=torch.bfloat16).nsa()
    times: dict[str, list[float]] = {"forward": [], "backward": []}
    for _ in range(a.repetitions):
        torch.cuda.synchronize()
        start = time.perf_counter()
        out = nsa.forward()
        times["forward"].append(time.perf_counter() - start)
        torch.cuda.synchronize()
        start = time.perf_counter()
        torch.autograd.grad(out, nsa.inputs, nsa.d_out)
        times["backward"].append(time.perf_counter() - start)
    for name, seconds in times.items():
        kept = seconds[len(seconds) // 4 :]  # the first compile
        print(f"{name}: median {statistics.median(kept) * 1e3:.3f} ms, least {min(kept) * 1e3:.3f} ms")


if __name__ == "__main__":
    main()
