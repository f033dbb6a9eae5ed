"""`nsa bench scale`: what several GPUs give over one. Every rank runs this; the first one writes.

What one GPU does, the first rank does while the others wait on the host, their GPUs idle.
"""

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from nsa.bench import scale_on_paper as on_paper
from nsa.bench.result import Entry, Result, when_and_where
from nsa.bench.scale_arguments import ScaleArguments
from nsa.bench.step import random_model
from nsa.bench.timing import device_facts, matrix_rate, peak_gib, require_cuda
from nsa.bench.train import synchronized
from nsa.config import NSAConfig
from nsa.distributed import ContextParallel, context_parallel
from nsa.modules.attention import NativeSparseAttention
from nsa.report.table import Table
from nsa.training.compiling import compile_between_hooks
from nsa.training.presets import preset
from nsa.training.sharded import shard_weights
from nsa.training.sizes import vocabulary

ALONE, EXCHANGES = "one GPU", "exchanges alone"
LINK = 2**28  # bytes that each rank receives where the connection itself is measured
RECEIVED, HOST, TOKENS = "GB received a rank", "host ms", "tokens"  # facts of an entry


def run(arguments: ScaleArguments) -> None:
    """Measure on all ranks; write after every entry, show at the end."""
    if arguments.on_paper:
        text = on_paper.text(arguments)
        print(text)
        if arguments.output:
            arguments.output.with_name(arguments.output.name + ".md").write_text(f"{text}\n")
        return
    require_cuda()
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise ValueError("nsa bench scale measures several GPUs; torchrun --nproc-per-node 2 -m nsa bench scale")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl")
    try:
        is_main = dist.get_rank() == 0
        rate = matrix_rate() if is_main else 0.0
        shape = {name: value for name, value in asdict(arguments).items() if name != "output"}
        facts = device_facts() | when_and_where() | {"GPUs": dist.get_world_size()}
        result = Result(bench="scale", facts=facts, shape=shape, matrix_rate=rate)
        for entry in measure(arguments):
            if not is_main:
                continue
            result.entries.append(entry)
            print(f"{entry.part}, {entry.length:,} tokens: {entry.ms} {entry.gib}", flush=True)
            if arguments.output:
                arguments.output.with_name(arguments.output.name + ".json").write_text(result.to_json())
        if is_main:
            text = "\n\n".join(table.markdown() for table in tables(result))
            print(text)
            if arguments.output:
                facts_line = ", ".join(f"{name} {value}" for name, value in facts.items())
                head = f"# nsa bench scale\n\n* {facts_line}\n* bf16 matrix products: {rate / 1e12:.0f} TFLOP/s\n\n"
                arguments.output.with_name(arguments.output.name + ".md").write_text(head + text + "\n")
    finally:
        dist.destroy_process_group()


def measure(arguments: ScaleArguments, device: str = "cuda") -> Iterator[Entry]:
    """The connection; one entry for every length of the layer, for the sharded model, and the longest row, as soon as
    it is known."""
    yield link(arguments, device)
    for length in arguments.lengths:
        yield layer(arguments, length, device)
    if arguments.row:
        yield from sharded(arguments, device)
    if arguments.longest:
        yield longest(arguments, device)


def world() -> DeviceMesh:
    """All ranks in a row."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return init_device_mesh(device, (dist.get_world_size(),))


def link(arguments: ScaleArguments, device: str) -> Entry:
    """What FSDP and context parallelism are made of: one all-gather, and one reduce-scatter, of much."""
    ranks = dist.get_world_size()
    own = torch.zeros(LINK // (ranks - 1) // 2, dtype=torch.bfloat16, device=device)
    whole = own.new_zeros(ranks * len(own))
    entry = Entry(length=len(whole), inputs="zeros", part="the connection", ms={})
    for label, work in (
        ("all-gather", partial(dist.all_gather_into_tensor, whole, own)),
        ("reduce-scatter", partial(dist.reduce_scatter_tensor, own, whole)),
    ):
        of_all(entry, label, work, max(arguments.repetitions, 1))
        entry.facts[f"{label}: {RECEIVED}"] = (len(whole) - len(own)) * 2 / 1e9
    return entry


def layer(arguments: ScaleArguments, length: int, device: str) -> Entry:
    """Forward and backward of a layer; a row of `length` tokens on one GPU, and shared by all."""
    torch.manual_seed(0)
    with torch.device(device):
        one = NativeSparseAttention(
            arguments.hidden_size, arguments.heads, arguments.kv_heads, arguments.head_dim
        ).bfloat16()
        x = torch.randn(1, length, arguments.hidden_size, dtype=torch.bfloat16)
        d_out = torch.randn_like(x)
    entry = Entry(length=length, inputs="random", part="layer, forward + backward", ms={})

    def pass_of(layer: nn.Module, x: Tensor, d_out: Tensor) -> Callable[[], object]:
        x = x.detach().requires_grad_()
        return lambda: torch.autograd.grad(layer(x), [x, *layer.parameters()], d_out)

    of_main(entry, ALONE, pass_of(one, x, d_out), arguments.repetitions)
    context = context_parallel(one, world())
    x, d_out = (context.zigzag.shard(y) for y in (x, d_out))
    label = f"{context.size} GPUs"
    of_all(entry, label, pass_of(one, x, d_out), arguments.repetitions)
    bytes_moved, talk = exchanges(arguments, context, x.shape[1], one.config, device)
    of_all(entry, EXCHANGES, talk, arguments.repetitions)
    entry.facts[f"{EXCHANGES}: {RECEIVED}"] = bytes_moved / 1e9
    del x, d_out, one
    forget()
    return entry


def exchanges(
    arguments: ScaleArguments, context: ContextParallel, t: int, config: NSAConfig, device: str
) -> tuple[float, Callable[[], object]]:
    """Bytes that a rank receives in forward and backward of a layer, and a function that sends as many."""
    size = (1, t, arguments.kv_heads, arguments.head_dim)
    raw = torch.zeros(size, dtype=torch.bfloat16, device=device)
    compressed = raw[:, : 2 * on_paper.blocks_of_a_chunk(t, config)]
    spans = context.zigzag.spans(t * context.size)
    halos = [
        tuple((max(0, start - reach), stop) for start, stop in spans)
        for reach in (config.window_size - 1, config.compress_block_size - 1)
    ]
    pair = arguments.kv_heads * arguments.head_dim
    forward, backward = on_paper.bytes_of_a_layer(t * context.size, context.size, pair, config)

    def talk() -> None:
        for _ in "kv":
            context.gather(raw)
            context.gather(compressed)
            for halo in halos:
                context.windows(raw, halo)
                context.windows(raw, halo)  # as much comes back
            for part in (raw, compressed):
                whole = part.new_zeros(1, part.shape[1] * context.size, *part.shape[2:], dtype=torch.float32)
                context.reduce_scatter(whole)

    return forward + backward, talk


def sharded(arguments: ScaleArguments, device: str) -> Iterator[Entry]:
    """Training steps: some rows on one GPU; as many on each of all, with weights and optimizer sharded (FSDP2)."""
    ranks = dist.get_world_size()
    entries = {
        rows: Entry(length=arguments.row, inputs="random", part=f"step of {arguments.preset}, {rows} rows a GPU", ms={})
        for rows in arguments.rows
    }
    if dist.get_rank() == 0:
        step = Trained(arguments, arguments.row, device)
        for rows, entry in entries.items():
            work = partial(step, step.batch((rows, arguments.row)))
            of_main(entry, ALONE, work, arguments.repetitions, step.resident())
            entry.facts[f"{ALONE}: {TOKENS}"] = float(rows * arguments.row)
        del step, work
        forget()
    dist.all_reduce(torch.zeros(()))
    for label, gather_once in ((f"{ranks} GPUs, FSDP2", False), (f"{ranks} GPUs, FSDP2, gathered once", True)):
        step = Trained(arguments, arguments.row, device, shard=True, gather_once=gather_once)
        for rows, entry in entries.items():
            work = partial(step, step.batch((rows, arguments.row)))
            of_all(entry, label, work, arguments.repetitions, step.resident())
            entry.facts[f"{label}: {TOKENS}"] = float(rows * arguments.row * ranks)
        del step, work
        forget()
    yield from entries.values()


def longest(arguments: ScaleArguments, device: str) -> Entry:
    """One step on one row that all share; one GPU is asked for the same first, and may lack the memory."""
    length, label = arguments.longest, f"{dist.get_world_size()} GPUs, FSDP2 and context parallelism"
    entry = Entry(length=length, inputs="random", part=f"one row through {arguments.preset}", ms={})
    if dist.get_rank() == 0:
        try:
            on_one(arguments, entry, length, device)
        except torch.OutOfMemoryError:
            entry.facts[f"{ALONE}: out of memory"] = 1.0
        forget()
    dist.all_reduce(torch.zeros(()))
    step = Trained(arguments, length, device, shard=True, share=True)
    of_all(entry, label, partial(step, step.batch((1, length))), 0, step.resident())
    del step
    forget()
    return entry


def on_one(arguments: ScaleArguments, entry: Entry, length: int, device: str) -> None:
    """A function of its own: what it holds is free once it has failed."""
    step = Trained(arguments, length, device)
    of_main(entry, ALONE, partial(step, step.batch((1, length))), 0, step.resident())


class Trained:
    """A model of the preset's with its optimizer, on this GPU or on all, as `nsa train` has it."""

    def __init__(
        self, arguments: ScaleArguments, length: int, device: str, *, shard: bool = False, share: bool = False,
        gather_once: bool = False,
    ) -> None:  # fmt: skip
        config = preset(arguments.preset)
        self.device, self.vocabulary = device, vocabulary(config)
        self.model = random_model(config, "nsa", length, config.num_layers, device)
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.context = context_parallel(self.model, world()) if share else None
        if arguments.compile:
            compile_between_hooks(self.model, on_cpu=device == "cpu")
        if shard:
            shard_weights(self.model, world(), in_bf16=True, gather_once=gather_once)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.learning_rate, fused=True)

    def batch(self, size: tuple[int, int]) -> dict[str, Tensor]:
        torch.manual_seed(0)
        ids = torch.randint(self.vocabulary, size, device=self.device)
        batch = {"input_ids": ids, "labels": ids}
        return batch if self.context is None else self.context.zigzag.shard_batch(batch)

    def __call__(self, batch: dict[str, Tensor]) -> None:
        with torch.autocast(self.device, torch.bfloat16):
            loss = self.model(**batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def resident(self) -> float:
        """GiB of weights, and of the optimizer's state as large again twice."""
        weights: nn.Module = self.model
        return sum(3 * x.numel() * x.element_size() for x in map(_local, weights.parameters())) / 2**30


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def of_main(
    entry: Entry, label: str, work: Callable[[], object], repetitions: int, resident: float | None = None
) -> None:
    """Measure on the first rank, while the others wait on the host."""
    if dist.get_rank() == 0:
        entry.ms[label], entry.gib[label], entry.facts[f"{label}: {HOST}"] = timed(work, repetitions, resident)
    if resident is None:
        dist.all_reduce(torch.zeros(()))


def of_all(
    entry: Entry, label: str, work: Callable[[], object], repetitions: int, resident: float | None = None
) -> None:
    """Measure on all ranks: the slowest, and the one that needs most."""
    dist.all_reduce(torch.zeros(()))
    found = torch.tensor(timed(work, repetitions, resident))
    dist.all_reduce(found, dist.ReduceOp.MAX)
    entry.ms[label], entry.gib[label], entry.facts[f"{label}: {HOST}"] = found.tolist()


def timed(work: Callable[[], object], repetitions: int, resident: float | None) -> tuple[float, float, float]:
    """Median milliseconds after a run that does not count, peak GiB, and the milliseconds in which the host had
    started everything; with no repetition that run's."""
    device, gib = "cuda" if torch.cuda.is_available() else "cpu", 0.0
    found: list[float] = []
    started: list[float] = []
    for repetition in range(repetitions + 1):
        start = synchronized(device)
        if repetition == repetitions and device == "cuda":
            gib = (resident or 0.0) + peak_gib(work)
        else:
            work()
            started.append((time.perf_counter() - start) * 1e3)
        found.append((synchronized(device) - start) * 1e3)
    return statistics.median(found[1:] or found), gib, statistics.median(started[1:] or started or found)


def forget() -> None:
    """Give memory back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def tables(result: Result) -> list[Table]:
    """Speed over one GPU, memory over one GPU's, and what the exchanges take."""
    rows = []
    for entry in result.entries:
        alone = entry.ms.get(ALONE)
        for name, ms in entry.ms.items():
            factor = entry.facts.get(f"{name}: {TOKENS}", 1.0) / entry.facts.get(f"{ALONE}: {TOKENS}", 1.0)
            gib, least = entry.gib.get(name), entry.gib.get(ALONE)
            received, host = entry.facts.get(f"{name}: {RECEIVED}"), entry.facts.get(f"{name}: {HOST}")
            rows.append(
                [
                    entry.part, f"{entry.length:,}", name, f"{ms:.1f}", "" if host is None else f"{host:.1f}",
                    "" if alone is None or received is not None else f"{alone / ms * factor:.2f}",
                    "" if gib is None else f"{gib:.1f}",
                    "" if gib is None or not least else f"{gib / least:.2f}",
                    "" if received is None else f"{received:.2f}",
                    "" if received is None else f"{received / ms * 1e3:.0f}",
                ]
            )  # fmt: skip
        if f"{ALONE}: out of memory" in entry.facts:
            rows.append([entry.part, f"{entry.length:,}", ALONE, "out of memory", *[""] * 6])
    header = [
        "what", "tokens", "by", "ms", "host ms", "tokens/s of one GPU's", "peak GiB", "of one GPU's", RECEIVED, "GB/s",
    ]  # fmt: skip
    return [Table("several GPUs over one", header, rows)]
