"""Times the kernels against torch's dense attention, in one interleaved run.

    python benchmarks/bench_kernels.py --lengths 8192 65536 --out results.json

Whole: q, k, v, compressed k, v and gates in, output out; and the backward of it. Dense: causal
scaled_dot_product_attention of the same q, k, v with cuDNN and with FlashAttention-2. Per kernel: each launcher alone.
Every repetition runs all candidates once, in turn, so that a drifting clock meets them all; the median is reported.
Inputs are random, and random with queries that resemble their neighbours (AR(1), .95): what the selected branch gains
from sharing blocks depends on that, so U4, the distinct blocks of four neighbouring queries, is printed.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nsa.config import NSAConfig
from nsa.kernels import rows
from nsa.kernels.attention import Layouts, attention_backward, attention_forward
from nsa.kernels.contiguous_backward import contiguous_backward
from nsa.kernels.contiguous_forward import contiguous_forward
from nsa.kernels.layout import Layout
from nsa.kernels.selected_backward import invert, selected_dkdv
from nsa.kernels.selected_forward import selected_dq, selected_forward
from nsa.kernels.selection import select_top_blocks
from nsa.ops.compress import compress, phi_mean

Candidates = dict[str, Callable[[], object]]
DENSE = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "FlashAttention-2": SDPBackend.FLASH_ATTENTION}


class Problem:
    """Inputs of one length, and everything a kernel needs that an earlier one makes."""

    def __init__(self, length: int, h: int, g: int, d: int, dtype: torch.dtype, correlated: bool) -> None:
        self.config = config = NSAConfig()
        generator = torch.Generator("cuda").manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device="cuda", dtype=dtype)

        self.q = normal(1, length, h, d)
        if correlated:
            self.q = autoregressive(self.q, 0.95)
        self.slc = (normal(1, length, g, d), normal(1, length, g, d))
        self.win = (normal(1, length, g, d), normal(1, length, g, d))
        # The mean of l independent keys is short; a trained phi gives keys as long as others.
        self.cmp = tuple(
            (compress(x, phi_mean, config) * config.compress_block_size**0.5).contiguous() for x in self.slc
        )
        self.d_out = normal(1, length, h, d)
        self.gates = normal(1, length, h, 3).sigmoid()
        self.scale = d**-0.5
        compressed = Layout(1, length, length, config.compress_block_size, config.compress_stride)
        raw = Layout(1, length, length)
        self.layouts = Layouts(compressed, raw, raw)
        self.rest = (self.layouts, config, self.scale)
        self.out, self.saved = attention_forward(self.q, self.cmp, self.slc, self.win, self.gates, *self.rest)

    def whole(self) -> tuple[Candidates, Candidates]:
        inputs = (self.q, self.cmp, self.slc, self.win, self.gates)
        return (
            {"nsa": lambda: attention_forward(*inputs, *self.rest)},
            {"nsa": lambda: attention_backward(*inputs, self.d_out, self.saved, *self.rest)},
        )

    def dense(self) -> tuple[Candidates, Candidates]:
        group = self.q.shape[2] // self.slc[0].shape[2]
        q = self.q.transpose(1, 2).detach().requires_grad_()
        k, v = (x.transpose(1, 2).repeat_interleave(group, 1).requires_grad_() for x in self.slc)
        d_out = self.d_out.transpose(1, 2)

        def forward(backend: SDPBackend) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        def backward(out: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(out, (q, k, v), d_out, retain_graph=True)

        forwards, backwards = {}, {}
        for name, backend in DENSE.items():
            out = forward(backend)
            forwards[name] = lambda backend=backend: forward(backend)
            backwards[name] = lambda out=out: backward(out)
        return forwards, backwards

    def kernels(self) -> Candidates:
        q, cmp, slc, win, d_out, saved = self.q, self.cmp, self.slc, self.win, self.d_out, self.saved
        config, scale, layouts, window = self.config, self.scale, self.layouts, self.config.window_size
        lse_cmp, lse_slc, lse_win = saved.lses
        deltas, _ = rows.gates_backward(saved.outs, saved.lses, self.gates, d_out)
        picks = saved.block_indices
        given = (q, *slc, picks, d_out, lse_slc, deltas[1], layouts.slc, config, scale)
        return {
            "forward: compressed": lambda: contiguous_forward(q, *cmp, layouts.cmp, None, scale),
            "forward: selection": lambda: select_top_blocks(q, cmp[0], lse_cmp, layouts.cmp, config, scale),
            "forward: selected": lambda: selected_forward(q, *slc, picks, layouts.slc, config, scale),
            "forward: window": lambda: contiguous_forward(q, *win, layouts.win, window, scale),
            "forward: combine": lambda: rows.combine(*saved.outs, self.gates),
            "backward: gates": lambda: rows.gates_backward(saved.outs, saved.lses, self.gates, d_out),
            "backward: compressed": lambda: contiguous_backward(
                q, *cmp, d_out, lse_cmp, deltas[0], layouts.cmp, None, scale
            ),
            "backward: window": lambda: contiguous_backward(
                q, *win, d_out, lse_win, deltas[2], layouts.win, window, scale
            ),
            "backward: selected dq": lambda: selected_dq(*given),
            "backward: inverse index": lambda: invert(picks, layouts.slc, config),
            "backward: selected dk, dv (with index)": lambda: selected_dkdv(*given),
        }

    def distinct_of_four(self) -> float:
        """U4: blocks that four neighbouring queries select between them, on average."""
        picks = self.saved.block_indices
        _, t, _, n = picks.shape
        fours = picks[:, : t // 4 * 4].unflatten(1, (-1, 4)).transpose(2, 3).reshape(-1, 4 * n).sort(-1).values
        return float(((fours[:, 1:] != fours[:, :-1]) & (fours[:, 1:] >= 0)).sum(-1).float().mean()) + 1


def autoregressive(x: Tensor, coefficient: float, reach: int = 128) -> Tensor:
    """AR(1) along dimension 1 with unit variance, its memory cut at `reach` (0.95^128 = 0.001)."""
    weights = coefficient ** torch.arange(reach - 1, -1, -1, device=x.device) * (1 - coefficient**2) ** 0.5
    b, t, h, d = x.shape
    lines = x.permute(0, 2, 3, 1).reshape(-1, 1, t)
    done = [
        F.conv1d(F.pad(part.float(), (reach - 1, 0)), weights.view(1, 1, -1)).to(x.dtype) for part in lines.split(256)
    ]
    return torch.cat(done).view(b, h, d, t).permute(0, 3, 1, 2).contiguous()


def interleaved(candidates: Candidates, repetitions: int) -> dict[str, float]:
    """Median milliseconds of each candidate."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for repetition in range(repetitions + 1):
        for name, run in candidates.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            if repetition > 0:  # the first one compiles and warms
                times[name].append(start.elapsed_time(end))
    return {name: statistics.median(found) for name, found in times.items()}


def peak_memory(run: Callable[[], object]) -> float:
    """GiB in use at the worst moment of it, inputs included."""
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**30


def measure(arguments: argparse.Namespace, length: int, correlated: bool) -> dict:
    problem = Problem(
        length, arguments.heads, arguments.kv_heads, arguments.head_dim, getattr(torch, arguments.dtype), correlated
    )
    forward, backward = problem.whole()
    result = {"length": length, "inputs": "correlated" if correlated else "random"}
    result["U4"] = problem.distinct_of_four()
    result["kernels"] = interleaved(problem.kernels(), arguments.repetitions)
    result["peak GiB"] = peak_memory(lambda: (forward["nsa"](), backward["nsa"]()))
    if not correlated:
        dense_forward, dense_backward = problem.dense()
        forward, backward = forward | dense_forward, backward | dense_backward
    result["forward"] = interleaved(forward, arguments.repetitions)
    result["backward"] = interleaved(backward, arguments.repetitions)
    return result


def table(results: list[dict]) -> str:
    lines = []
    for result in results:
        lines += [f"\n### {result['length']} tokens, {result['inputs']} inputs"]
        lines += [f"\nU4 {result['U4']:.1f}; peak memory, forward + backward: {result['peak GiB']:.1f} GiB\n"]
        lines += ["| | ms | times NSA |", "|---|---|---|"]
        for part in ("forward", "backward"):
            own = result[part]["nsa"]
            lines += [f"| {part}, {name} | {ms:.2f} | {ms / own:.2f} |" for name, ms in result[part].items()]
        lines += [f"| {name} | {ms:.2f} | |" for name, ms in result["kernels"].items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768, 65536, 131072])
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    results = []
    for length in arguments.lengths:
        for correlated in (False, True):
            results.append(measure(arguments, length, correlated))
            print(table(results[-1:]), flush=True)
            torch.cuda.empty_cache()
            if arguments.out:
                arguments.out.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
