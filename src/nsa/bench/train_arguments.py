"""The arguments of `nsa bench train`."""

from dataclasses import dataclass
from typing import Literal

from nsa.bench.options import Json, Output, Repetitions
from nsa.methods.registry import Attention


@dataclass(frozen=True)
class TrainArguments:
    """Training steps of whole models, NSA beside its dense and window twins: tokens a second, and where time goes.

    A step: a batch copied to the device, forward, backward, fused AdamW; bf16 autocast over fp32 weights. Rows hold one
    document each; packed ones hold documents whose lengths are log-normal (standard deviation of the logarithm: 1), cut
    at the ends of rows and then side by side in one row. Compiled are the layers, as nsa train compiles them; graphs:
    the same in CUDA graphs, whose memory is not counted. Also launches of a step,
    copies from the device (each waits for it), graphs that were compiled, the share of the step spent waiting for data,
    and peak memory, weights and optimizer included. All candidates are in memory and take turns, or one attention after
    the other where they do not fit.

    Examples:
        nsa bench train --models small
        nsa bench train --models 300m --lengths 8192 --layouts rows --output train_300m_h200
        nsa bench train --models 1b --lengths 8192 32768 --layouts rows --modes graphs --attentions nsa dense
    """

    models: tuple[Literal["demo", "small", "300m", "1b"], ...] = ("small", "300m", "1b")
    """Whose sizes: a preset of nsa train, or 300m: hidden size 1024, 12 layers, 16 query heads and 1 KV head of 64."""
    lengths: tuple[int, ...] = (4096, 8192, 32768)
    """Tokens in a row."""
    layouts: tuple[Literal["rows", "packed"], ...] = ("rows", "packed")
    """One document a row, or packed documents."""
    attentions: tuple[Attention, ...] = ("nsa", "dense", "window")
    """NSA, InfLLM-V2 and the twins, each with the preset's sizes."""
    modes: tuple[Literal["graphs", "compiled", "eager"], ...] = ("graphs", "compiled", "eager")
    """With torch.compile and CUDA graphs (nsa train's default), with torch.compile alone, with neither."""
    tokens: int = 32768
    """Tokens in a step, at least a row."""
    mean_document: int = 1024
    """Mean length of packed documents before they are cut, in tokens."""
    checkpointing: bool | None = None
    """Gradient checkpointing. Default: as the preset has it, which is for 1b alone."""
    workers: int = 2
    """Processes that make batches."""
    steps: int = 3
    """Steps of a candidate before the next one's turn."""
    repetitions: Repetitions = 5
    seed: int = 0
    """Of documents and tokens."""
    output: Output = None
    json: Json = False
