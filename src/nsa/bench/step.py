"""`nsa bench step`: a whole training step of a language model, beside its dense twin."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.nn.attention import sdpa_kernel

from nsa.bench.arguments import StepArguments
from nsa.bench.layer import DENSE_BACKENDS
from nsa.bench.result import Entry
from nsa.bench.timing import interleaved, peak_gib
from nsa.models import NSALlamaForCausalLM
from nsa.training.config import TrainConfig
from nsa.training.presets import preset
from nsa.training.sizes import model_config, vocabulary


def measure(arguments: StepArguments, device: str = "cuda") -> Iterator[Entry]:
    """One step: bf16 autocast over fp32 weights, gradient checkpointing, fused AdamW; random tokens."""
    config = preset(arguments.preset)
    longest = max(arguments.lengths)
    steps = {
        label: training_step(config, attention, longest, arguments.layers, device)
        for label, attention in (("NSA", "nsa"), ("dense", "dense"))
    }
    for length in arguments.lengths:
        ids = torch.randint(vocabulary(config), (1, length), device=device)
        runs = {label: partial(step, ids) for label, (step, _) in steps.items()}
        ms = interleaved(runs, arguments.repetitions)
        yield Entry(
            length=length,
            inputs="random",
            part="step",
            ms=ms,
            gib={name: peak_gib(run) for name, run in runs.items()},
            facts={f"parameters, {name}": float(count) for name, (_, count) in steps.items()},
        )


def training_step(
    config: TrainConfig, attention: str, max_length: int, layers: int | None, device: str
) -> tuple[Callable[[torch.Tensor], object], int]:
    """A function that trains on one row of token ids, and the number of parameters."""
    model = random_model(config, attention, max_length, layers or config.num_layers, device)
    model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, fused=True)

    def step(ids: torch.Tensor) -> Any:
        with sdpa_kernel(DENSE_BACKENDS, set_priority=True):
            with torch.autocast(device, torch.bfloat16):
                loss = model(ids, labels=ids).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, sum(parameter.numel() for parameter in model.parameters())


def random_model(config: TrainConfig, attention: str, max_length: int, layers: int, device: str) -> NSALlamaForCausalLM:
    """Of a preset's sizes, with random weights, ready to be trained."""
    torch.manual_seed(0)
    with torch.device(device):
        model = NSALlamaForCausalLM(
            model_config(
                config,
                attention=attention,
                num_hidden_layers=layers,
                max_position_embeddings=max_length,
                use_cache=False,
            )
        )
    return model.train()
