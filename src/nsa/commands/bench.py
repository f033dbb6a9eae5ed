"""`nsa bench`: what things cost on a GPU, each bench a command of its own."""

import inspect
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from nsa.bench.arguments import (
    DecodeArguments,
    GenerateArguments,
    KernelArguments,
    ModuleArguments,
    ShowArguments,
    StepArguments,
    TrainArguments,
)  # fmt: skip
from nsa.bench.scale_arguments import ScaleArguments
from nsa.bench.serve_arguments import ServeArguments


def _subcommand(name: str, arguments: type) -> Any:
    return tyro.conf.subcommand(name, prefix_name=False, description=inspect.cleandoc(arguments.__doc__ or ""))


@dataclass(frozen=True)
class Arguments:
    """What the kernels, a layer, training and decoding cost on this machine's GPU, beside dense attention.

    Examples:
        nsa bench kernels --lengths 8192 65536
        nsa bench module
        nsa bench step --lengths 32768
        nsa bench train --models small --lengths 4096
        nsa bench decode --lengths 65536 --batches 1 32
        nsa bench generate --lengths 65536 --batches 8
        nsa bench serve http://127.0.0.1:8000/v1
        torchrun --nproc-per-node 2 -m nsa bench scale
        nsa bench kernels --help
    """

    what: Annotated[
        Annotated[KernelArguments, _subcommand("kernels", KernelArguments)]
        | Annotated[ModuleArguments, _subcommand("module", ModuleArguments)]
        | Annotated[StepArguments, _subcommand("step", StepArguments)]
        | Annotated[TrainArguments, _subcommand("train", TrainArguments)]
        | Annotated[DecodeArguments, _subcommand("decode", DecodeArguments)]
        | Annotated[GenerateArguments, _subcommand("generate", GenerateArguments)]
        | Annotated[ServeArguments, _subcommand("serve", ServeArguments)]
        | Annotated[ScaleArguments, _subcommand("scale", ScaleArguments)]
        | Annotated[ShowArguments, _subcommand("show", ShowArguments)],
        tyro.conf.arg(name=""),
    ]


def run(arguments: Arguments) -> None:
    if isinstance(arguments.what, ShowArguments):
        from nsa.bench.show import show

        show(arguments.what)
    elif isinstance(arguments.what, ServeArguments):
        from nsa.bench.serve import measure

        measure(arguments.what)
    elif isinstance(arguments.what, ScaleArguments):
        from nsa.bench.scale import run as run_scale

        run_scale(arguments.what)
    else:
        from nsa.bench.run import run

        run(arguments.what)
