"""The arguments of `nsa bench scale`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class ScaleArguments:
    """What several GPUs give over one, under torchrun: a layer with shared sequences, a sharded model, the longest row.

    What the connection gives (an all-gather, a reduce-scatter). A layer with NSA, forward and backward in bf16, its
    sequence on one GPU, and shared by all (context parallelism): time, peak memory, bytes moved as counted, and the
    time that the same exchanges take by themselves. Then training steps of a preset's model as nsa train has it (layers
    compiled, bf16 autocast over fp32 weights, gradient checkpointing, fused AdamW): rows of 8k on one GPU, and as many
    on each of all (FSDP2); and one step on one row of `longest` tokens that all share. "host ms" is when the host had
    started all of a step: where it comes near the step's own time, the GPU waits for the host.

    With --on-paper nothing is measured, and no GPU is needed: tables for 2, 8 and 64 GPUs, of counted operations and
    bytes and of the rates `measured_...`, which are two H200's (benchmarks/results).

    Examples:
        NCCL_NVLS_ENABLE=0 torchrun --nproc-per-node 2 -m nsa bench scale --output scale_2xh200
        torchrun --nproc-per-node 8 -m nsa bench scale --lengths 131072 1048576 --longest 2097152
        nsa bench scale --on-paper
    """

    lengths: tuple[int, ...] = (32768, 131072, 262144)
    """Tokens of the layer's sequence."""
    hidden_size: int = 2560
    """Width of the layer's input."""
    heads: int = 64
    """Query heads."""
    kv_heads: int = 4
    """KV heads."""
    head_dim: int = 128
    """Width of a head."""
    repetitions: int = 3
    """Runs that count, after one that does not."""
    preset: str = "1b"
    """Whose model the training steps are of."""
    row: int = 8192
    """Tokens of a row in the steps of the sharded model; 0 leaves them out."""
    rows: tuple[int, ...] = (4,)
    """Rows of each GPU in a step, one measurement for each number."""
    compile: bool = True
    """torch.compile of each layer in the steps."""
    longest: int = 524288
    """Tokens of the one row that all share in a step of the same model; 0 leaves it out."""
    on_paper: bool = False
    """A model of more GPUs, in place of a measurement."""
    measured_layer_ms: float = 393.6
    """Of the layer above, forward and backward, 131,072 tokens, one GPU."""
    measured_row_ms: float = 19725.6
    """Of a step of the 1b preset on one row of 524,288 tokens, two GPUs."""
    measured_exchange_gb_s: float = 75.0
    """GB/s that a rank receives in a layer's exchanges, the copies beside them included."""
    network_gb_s: float = 50.0
    """GB/s a GPU between hosts of eight, for 64 GPUs: assumed (400 Gbit/s), not measured."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="STEM")] = None
    """Write STEM.json after every measurement, STEM.md at the end."""
