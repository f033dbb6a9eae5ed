"""`nsa bench train`: training steps of whole models, NSA beside its twins, compiled and eager, rows and packed ones.

A step is what `nsa train` does between two batches: copy the batch to the device, forward, backward, fused AdamW, in
bf16 autocast over fp32 weights. Batches come from training's own data set, made by workers meanwhile.
"""

import gc
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from nsa.bench.result import Entry
from nsa.bench.step import random_model
from nsa.bench.timing import peak_gib
from nsa.bench.train_arguments import TrainArguments
from nsa.methods.registry import TRAINED
from nsa.training.compiling import PARTS, begin_step, compiled_parts
from nsa.training.config import TrainConfig
from nsa.training.curriculum import Stage
from nsa.training.data import Documents, TrainingBatches, unwrap
from nsa.training.presets import preset
from nsa.training.sizes import vocabulary

LABELS = {name: method.label for name, method in TRAINED.items()}
MODES = {"graphs": "", "compiled": ", no graphs", "eager": ", eager"}
LAYOUTS: Any = {"rows": "rows", "packed": "flat"}  # as training calls them
SPREAD = 1.0  # standard deviation of the logarithm of a document's length
CORPUS = 1 << 22  # tokens
GRAPHS = 64  # that torch.compile may keep for one function: all models of a run share the code of theirs
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "hipLaunchKernel", "hipModuleLaunchKernel", "cudaGraphLaunch")

Batch = Mapping[str, Any]
Step = Callable[[Batch], object]


def configuration(model: str) -> TrainConfig:
    """A preset, or the 300M class: the paper's block sizes, one KV head for sixteen query heads."""
    if model != "300m":
        return preset(model)
    return replace(
        preset("1b"), hidden_size=1024, num_layers=12, num_heads=16, num_kv_heads=1, intermediate_size=5632,
        gradient_checkpointing=False,
    )  # fmt: skip


def measure(arguments: TrainArguments, device: str = "cuda") -> Iterator[Entry]:
    """One entry for every model, layout and length, as soon as it is known."""
    limit: AbstractContextManager[Any] = torch._dynamo.config.patch(recompile_limit=GRAPHS)
    with limit:
        for model in arguments.models:
            models: dict[str, Trained] = {}
            for layout in arguments.layouts:
                for length in arguments.lengths:
                    yield cell(arguments, model, layout, length, models, device)
            forget(models)
            torch._dynamo.reset()


def cell(
    arguments: TrainArguments, model: str, layout: str, length: int, models: "dict[str, Trained]", device: str
) -> Entry:
    """All candidates in turn, all models in memory; where they do not fit, one attention after the other."""
    tokens = max(1, arguments.tokens // length) * length
    entry = Entry(length=length, inputs=layout, part=model, ms={}, facts={"tokens": float(tokens)})
    if fits(entry, arguments, arguments.attentions, models, device):
        return entry
    for attention in arguments.attentions:
        forget(models)
        if not fits(entry, arguments, [attention], models, device):
            entry.facts[f"{LABELS[attention]}: out of memory"] = 1.0
    forget(models)
    return entry


def fits(
    entry: Entry, arguments: TrainArguments, attentions: Sequence[str], models: "dict[str, Trained]", device: str
) -> bool:
    """Measure into `entry`; False where memory does not suffice."""
    config = configuration(entry.part)
    try:
        for attention in attentions:
            if attention not in models:
                models[attention] = Trained(config, attention, max(arguments.lengths), arguments.checkpointing, device)
        steps = {
            LABELS[attention] + MODES[mode]: models[attention].stepper(mode)
            for attention in attentions
            for mode in arguments.modes
        }
        batches = batches_of(arguments, config, entry.inputs, entry.length, pin=device == "cuda")
        entry.facts["documents"] = float(documents_in(next(batches)))
        in_turn(entry, steps, batches, arguments.repetitions, arguments.steps, device)
        for label, step in steps.items():
            run = partial(step, next(batches))
            entry.facts.update({f"{label}: {what}": float(n) for what, n in calls(run, device).items()})
            if device == "cuda" and label not in LABELS.values():  # the graphs' memory is not counted as allocated
                trained = models[next(name for name in attentions if label.startswith(LABELS[name]))]
                entry.gib[label] = trained.resident() / 2**30 + peak_gib(run)
    except torch.OutOfMemoryError:
        return False
    return True


class Trained:
    """A model with its optimizer; its eager and its compiled steps train the same weights."""

    def __init__(
        self, config: TrainConfig, attention: str, longest: int, checkpointing: bool | None, device: str
    ) -> None:
        self.device = device
        self.model = random_model(config, attention, longest, config.num_layers, device)
        if config.gradient_checkpointing if checkpointing is None else checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.learning_rate, fused=True)
        self.parts = {"eager": {name: getattr(self.model, name) for name in PARTS}}

    def stepper(self, mode: str) -> Step:
        """A training step; a mode of `MODES`."""
        if mode not in self.parts:
            self._put("eager")
            self.parts[mode] = compiled_parts(self.model, cuda_graphs=mode == "graphs")
        return partial(self.step, mode)

    def step(self, mode: str, batch: Batch) -> None:
        self._put(mode)
        if mode == "graphs":
            begin_step()
        batch = {
            name: x.to(self.device, non_blocking=True) if isinstance(x, Tensor) else x for name, x in batch.items()
        }
        with torch.autocast(self.device, torch.bfloat16):
            loss = self.model(**batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _put(self, mode: str) -> None:
        for name, part in self.parts[mode].items():
            setattr(self.model, name, part)

    def resident(self) -> int:
        """Bytes of weights and of the optimizer's state."""
        states = [x for state in self.optimizer.state.values() for x in state.values()]
        return sum(x.numel() * x.element_size() for x in [*self.model.parameters(), *states])


def batches_of(
    arguments: TrainArguments, config: TrainConfig, layout: str, length: int, pin: bool
) -> Iterator[dict[str, Any]]:
    """Random tokens as training reads them, without end: rows of one document, or documents that follow each other."""
    rng = np.random.default_rng(arguments.seed)
    total = max(CORPUS, 2 * arguments.tokens, 2 * length)
    starts = [0]
    if layout == "packed":  # log-normal: the mean is exp(mu + SPREAD^2 / 2)
        mean = math.log(arguments.mean_document) - SPREAD**2 / 2
        lengths = rng.lognormal(mean, SPREAD, 4 * total // arguments.mean_document + 16).astype(int).clip(2)
        ends = lengths.cumsum()
        starts += ends[ends < total - 1].tolist()
    documents = Documents(rng.integers(0, vocabulary(config), total, dtype=np.uint32), starts)
    dataset = TrainingBatches(
        documents, [Stage(length=length, steps=10**6)], arguments.tokens,
        encode=no_examples, filler="", seed=arguments.seed, layout=LAYOUTS[layout],
    )  # fmt: skip
    loader: DataLoader = DataLoader(dataset, collate_fn=unwrap, num_workers=arguments.workers, pin_memory=pin)
    return iter(loader)


def no_examples(text: str) -> list[int]:
    """The stages hold text only."""
    return []


def documents_in(batch: Batch) -> int:
    positions = batch.get("position_ids")
    return len(batch["input_ids"]) if positions is None else int((positions == 0).sum())


def in_turn(
    entry: Entry,
    steps: Mapping[str, Step],
    batches: Iterator[dict[str, Any]],
    repetitions: int,
    count: int,
    device: str,
) -> None:
    """Median milliseconds of a step, by the clock, and the share of them in which it waited for a batch.

    Every repetition runs `count` steps of each candidate, which may run into each other; between candidates the device
    comes to rest. The first repetition, which compiles, does not count.
    """
    ms, waiting, graphs = (defaultdict[str, list[float]](list) for _ in range(3))
    for _ in range(repetitions + 1):
        for label, step in steps.items():
            compiled, waited, start = counters["stats"]["unique_graphs"], 0.0, synchronized(device)
            for _ in range(count):
                asked = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - asked
                step(batch)
            elapsed = synchronized(device) - start
            ms[label].append(elapsed / count * 1e3)
            waiting[label].append(waited / elapsed)
            graphs[label].append(counters["stats"]["unique_graphs"] - compiled)
    for label in steps:
        entry.ms[label] = statistics.median(ms[label][1:])
        entry.facts[f"{label}: waiting"] = statistics.median(waiting[label][1:])
        entry.facts[f"{label}: graphs"] = sum(graphs[label])


def synchronized(device: str) -> float:
    """The time once the device is at rest."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def calls(run: Callable[[], object], device: str) -> dict[str, int]:
    """Kernel launches of a step, and copies from the device, each of which waits for it."""
    if device != "cuda":
        return {"launches": 0, "host reads": 0}
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:  # operations on the host are many and slow to read
        run()
        synchronized(device)
    counts = {event.key: event.count for event in profiler.key_averages()}
    launches = sum(count for name, count in counts.items() if name.startswith(LAUNCHES))
    return {"launches": launches, "host reads": sum(n for name, n in counts.items() if name.startswith("Memcpy DtoH"))}


def forget(models: "dict[str, Trained]") -> None:
    """Give their memory back."""
    models.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
