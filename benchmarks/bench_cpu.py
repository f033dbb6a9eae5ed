"""NSA beside torch's SDPA on this CPU: forward, forward + backward, and one decoding step, interleaved in one run.

    python benchmarks/bench_cpu.py                              # 4k to 64k tokens, decoding at 8k to 128k
    python benchmarks/bench_cpu.py --lengths 4096 8192 --repeats 5
    python benchmarks/bench_cpu.py --output benchmarks/results/cpu.json

Everything is measured from q, k, v and gates to the output. Compression takes the mean; window and selection share
k and v. Times depend on the machine; the ratios are the result. Decoding is set beside SDPA twice: as it is called
(`enable_gqa`), and with the query heads folded into the query dimension, the fastest way found for one KV head.
"""

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from nsa import NSAConfig, native_sparse_attention
from nsa.ops.compress import compress, phi_mean

Row = dict[str, Any]


@dataclass(frozen=True)
class Arguments:
    lengths: tuple[int, ...] = (4096, 8192, 16384, 32768, 65536)  # tokens of the forward and backward passes
    backward_up_to: int = 65536  # dense backward is quadratic: longest length for it
    decode_lengths: tuple[int, ...] = (8192, 16384, 32768, 65536, 131072)  # tokens in the cache of the decoding step
    heads: int = 16
    kv_heads: int = 1
    head_dim: int = 64
    memory_length: int = (
        65536  # tokens of the forward and backward pass whose peak memory is measured (8 heads); 0: none
    )
    repeats: int = 3  # the median counts; lengths from 32k are measured once
    threads: int = 2
    output: Path | None = None  # write the rows as JSON, after every measurement


def inputs(arguments: Arguments, t: int, s: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(s)
    shapes = [(1, t, arguments.heads), (1, s, arguments.kv_heads), (1, s, arguments.kv_heads)]
    q, k, v = (torch.randn(*shape, arguments.head_dim, generator=generator) for shape in shapes)
    return q, k, v, torch.rand(1, t, arguments.heads, 3, generator=generator)


def seconds(*calls: Callable[[], object], repeats: int) -> list[float]:
    """Median seconds of each call, taken in turns so that a busy machine disturbs all alike."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, mine in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            mine.append(time.perf_counter() - start)
    return [median(mine) for mine in times]


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=q.shape[1] > 1, enable_gqa=True
    )


def forward_row(arguments: Arguments, length: int, backward: bool) -> Row:
    q, k, v, gates = inputs(arguments, length, length)
    tensors = [x.requires_grad_(backward) for x in (q, k, v, gates)]

    def run(attention: Callable[..., Tensor], *given: Tensor) -> None:
        out = attention(*given)
        if backward:
            torch.autograd.grad(out.sum(), given)

    repeats = arguments.repeats if length < 32768 else 1
    if length < 32768:
        run(native_sparse_attention, *tensors)
        run(dense, *tensors[:3])
    ours, theirs = seconds(
        lambda: run(native_sparse_attention, *tensors), lambda: run(dense, *tensors[:3]), repeats=repeats
    )
    what = "forward + backward" if backward else "forward"
    return {"what": what, "tokens": length, "nsa_s": ours, "sdpa_s": theirs, "speedup": theirs / ours}


@torch.no_grad()
def decode_row(arguments: Arguments, length: int) -> Row:
    config = NSAConfig()
    q, k, v, gates = inputs(arguments, 1, length)
    k_cmp, v_cmp = compress(k, phi_mean, config), compress(v, phi_mean, config)
    near = {"k_win": k[:, -config.window_size :], "v_win": v[:, -config.window_size :]}
    folded = q.view(1, arguments.kv_heads, -1, arguments.head_dim)  # a group's heads as queries of its KV head
    calls = (
        lambda: native_sparse_attention(q, k, v, gates, k_cmp=k_cmp, v_cmp=v_cmp, **near),
        lambda: dense(q, k, v),
        lambda: F.scaled_dot_product_attention(folded, k.transpose(1, 2), v.transpose(1, 2)),
    )
    for call in calls:
        call()
    ours, gqa, fold = seconds(*calls, repeats=10 * arguments.repeats)
    return {
        "what": "decode", "tokens": length, "nsa_s": ours, "sdpa_s": gqa, "speedup": gqa / ours,
        "sdpa_folded_s": fold, "speedup_folded": fold / ours,
    }  # fmt: skip


def memory_row(arguments: Arguments, length: int) -> Row:
    """Of a process of its own: torch, the inputs, forward and backward, H=8, HK=1, D=64."""
    script = f"""
import resource, torch
from nsa import native_sparse_attention
torch.set_num_threads({arguments.threads})
inputs = [torch.randn(1, {length}, h, d, requires_grad=True) for h, d in ((8, 64), (1, 64), (1, 64))]
inputs.append(torch.rand(1, {length}, 8, 3, requires_grad=True))
torch.autograd.grad(native_sparse_attention(*inputs).sum(), inputs)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return {"what": "peak memory of forward + backward, H=8", "tokens": length, "gib": int(run.stdout) / 2**20}


def main(arguments: Arguments) -> None:
    torch.set_num_threads(arguments.threads)
    console, rows = Console(width=110), []
    console.print(
        f"torch {torch.__version__}, {arguments.threads} threads, {platform.processor() or platform.machine()}; "
        f"H={arguments.heads} HK={arguments.kv_heads} D={arguments.head_dim} fp32, {NSAConfig()}"
    )
    work = [(forward_row, (arguments, length, False)) for length in arguments.lengths]
    work += [
        (forward_row, (arguments, length, True)) for length in arguments.lengths if length <= arguments.backward_up_to
    ]
    work += [(decode_row, (arguments, length)) for length in arguments.decode_lengths]
    if arguments.memory_length:
        work.append((memory_row, (arguments, arguments.memory_length)))
    with console.status("measuring") as status:
        for function, given in work:
            what = function.__name__.removesuffix("_row")
            status.update(f"measuring {what} at {given[1]} tokens")
            rows.append(function(*given))
            console.print(
                ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items())
            )
            if arguments.output:
                arguments.output.parent.mkdir(parents=True, exist_ok=True)
                arguments.output.write_text(json.dumps(rows, indent=2))
    console.print(table([row for row in rows if "nsa_s" in row]))


def table(rows: list[Row]) -> Table:
    table = Table("", "tokens", "NSA", "SDPA", "speed-up", "NSA us/token", "SDPA folded", "speed-up")
    for row in rows:
        decode = row["what"] == "decode"
        scale, unit = (1e3, "ms") if decode else (1, "s")
        more = (f"{row['sdpa_folded_s'] * scale:.2f} {unit}", f"{row['speedup_folded']:.2f}x") if decode else ("", "")
        per_token = "" if decode else f"{row['nsa_s'] / row['tokens'] * 1e6:.0f}"
        table.add_row(
            str(row["what"]), f"{row['tokens']}", f"{row['nsa_s'] * scale:.2f} {unit}",
            f"{row['sdpa_s'] * scale:.2f} {unit}", f"{row['speedup']:.2f}x", per_token, *more,
        )  # fmt: skip
    return table


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
