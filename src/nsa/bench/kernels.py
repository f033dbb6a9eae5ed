"""`nsa bench kernels`: the attention function whole, each kernel alone, and dense attention, in one interleaved run."""

import sys
from collections.abc import Iterator

import torch

from nsa.bench.arguments import KernelArguments
from nsa.bench.candidates import Problem
from nsa.bench.result import Entry
from nsa.bench.timing import Candidates, interleaved, peak_gib
from nsa.config import NSAConfig
from nsa.costs.flops import Shape, kernel_flops, limit_flops
from nsa.kernels import rows
from nsa.kernels import selected_by_block as by_block
from nsa.kernels.attention import Layouts, attention_forward
from nsa.kernels.contiguous_backward import contiguous_backward
from nsa.kernels.contiguous_forward import contiguous_forward
from nsa.kernels.inverse import invert
from nsa.kernels.launch import Heads
from nsa.kernels.layout import Layout
from nsa.kernels.selected_backward import selected_dkdv
from nsa.kernels.selected_forward import selected_dq, selected_forward
from nsa.kernels.selected_gradients import selected_gradients
from nsa.kernels.selection import select_top_blocks


def measure(arguments: KernelArguments, device: str = "cuda") -> Iterator[Entry]:
    """Entries of every length, random inputs first; dense attention, which does not depend on them, with those."""
    config = NSAConfig()
    for length in arguments.lengths:
        shape = Shape(length=length, h=arguments.heads, g=arguments.kv_heads, d=arguments.head_dim, e=arguments.e)
        for inputs in ("random", "correlated"):
            problem = Problem(
                shape, config, correlated=inputs == "correlated", dtype=getattr(torch, arguments.dtype), device=device
            )
            yield from _whole(problem, inputs, arguments)
            yield Entry(
                length=length,
                inputs=inputs,
                part="kernels",
                ms=interleaved(single_kernels(problem), arguments.repetitions),
                flops={name: float(x) for name, x in kernel_flops(shape, config).items()},
            )
            del problem
            torch.cuda.empty_cache()


def _whole(problem: Problem, inputs: str, arguments: KernelArguments) -> Iterator[Entry]:
    nsa = problem.nsa()
    candidates, gib = {"NSA": nsa}, {"NSA": peak_gib(nsa.both)}
    facts = {"U4": problem.distinct_of_four()}
    if inputs == "random":
        torch.compiler.reset()  # FlexAttention is compiled for each length
        for name, make in problem.rivals().items():
            if arguments.wants(name):
                try:
                    rival = make()
                    gib[name] = peak_gib(rival.both)
                    candidates[name] = rival
                except Exception as error:  # whatever it is, the others go on without this one
                    reason = f"{type(error).__name__}: {error}".splitlines()[0]
                    print(f"nsa bench: {name} at {problem.shape.length:,} tokens: {reason}", file=sys.stderr)
    shape, limits = problem.shape, limit_flops(problem.shape, problem.config)

    def flops(part: str) -> dict[str, float]:
        found = {name: float(limits[f"dense {part}"]) for name in candidates}
        found["NSA"] = float(limits[part])
        branch = kernel_flops(shape, problem.config)["forward: selected"]
        if "FlexAttention, selected branch" in found:
            ratio = limits["forward"] if part == "forward" else limits["backward"]
            found["FlexAttention, selected branch"] = branch * ratio / limits["forward"]
        return found

    forwards = interleaved({name: x.forward for name, x in candidates.items()}, arguments.repetitions)
    yield Entry(
        length=shape.length, inputs=inputs, part="forward", ms=forwards, gib=gib, flops=flops("forward"), facts=facts
    )
    outs = {name: x.forward() for name, x in candidates.items()}
    backwards = {name: lambda x=x, out=outs[name]: x.backward(out) for name, x in candidates.items()}
    yield Entry(
        length=shape.length,
        inputs=inputs,
        part="backward",
        ms=interleaved(backwards, arguments.repetitions),
        flops=flops("backward"),
    )


@torch.no_grad()
def single_kernels(problem: Problem) -> Candidates:
    """Each launcher alone, on what the ones before it give."""
    config, shape, window = problem.config, problem.shape, problem.config.window_size
    q, gates, d_out = (x.detach() for x in (problem.q, problem.gates, problem.d_out))
    cmp, slc, win = ((k.detach(), v.detach()) for k, v in (problem.cmp, problem.slc, problem.win))
    raw = Layout(1, shape.length, shape.length)
    compressed = Layout(1, shape.length, shape.length, config.compress_block_size, config.compress_stride)
    layouts, scale = Layouts(compressed, raw, raw), shape.d**-0.5
    _, saved = attention_forward(q, (cmp, slc, win), gates, layouts, config, scale)
    picks = saved.block_indices
    _, deltas, lses = rows.gates_backward(saved.outs, saved.lses, gates, d_out)
    given = (q, *slc, picks, d_out, lses[1], deltas[1], raw, config, scale)
    selected: Candidates = {
        "backward: selected dq": lambda: selected_dq(*given),
        "backward: selected dk, dv": lambda: selected_dkdv(*given),
    }
    if by_block.serves(q, Heads.of(q, *slc), config):
        selected = {"backward: selected": lambda: selected_gradients(*given)}
    return {
        "forward: compressed": lambda: contiguous_forward(q, *cmp, compressed, None, scale),
        "forward: selection": lambda: select_top_blocks(q, cmp[0], saved.lses[0], compressed, config, scale),
        "forward: selected": lambda: selected_forward(q, *slc, picks, raw, config, scale),
        "forward: window": lambda: contiguous_forward(q, *win, raw, window, scale),
        "forward: combine": lambda: rows.combine(*saved.outs, gates),
        "backward: gates": lambda: rows.gates_backward(saved.outs, saved.lses, gates, d_out),
        "backward: compressed": lambda: contiguous_backward(
            q, *cmp, d_out, lses[0], deltas[0], compressed, None, scale
        ),
        "backward: window": lambda: contiguous_backward(q, *win, d_out, lses[2], deltas[2], raw, window, scale),
        "backward: inverse index": lambda: invert(picks, raw, config),
        **selected,
    }
