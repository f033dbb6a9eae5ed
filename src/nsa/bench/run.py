"""What every bench does: see that its sizes can be, measure, write down after every measurement, show."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from nsa.bench.command import DecodeArguments, GenerateArguments, KernelArguments, ModuleArguments, StepArguments
    from nsa.bench.train_command import TrainArguments

    Measured: TypeAlias = (
        KernelArguments | ModuleArguments | StepArguments | TrainArguments | DecodeArguments | GenerateArguments
    )


def check(arguments: Measured, lengths: tuple[int, ...]) -> None:
    if not lengths or min(lengths) < 1:
        raise ValueError(f"--lengths: expected positive numbers of tokens, got {list(lengths)}")
    numbers = {name: value for name, value in asdict(arguments).items() if type(value) is int}
    for name, value in numbers.items():
        least = 0 if name in ("dense_prompt", "workers", "seed") else 1
        if value < least:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least {least}, got {value}")
    heads, kv_heads = numbers.get("heads", 1), numbers.get("kv_heads", 1)
    if heads % kv_heads:
        raise ValueError(f"--heads: expected a multiple of --kv-heads, got {heads} and {kv_heads}")


def run(bench: str, arguments: Measured) -> None:
    """Measure, write down after every entry, show."""
    from nsa.bench.timing import require_cuda

    require_cuda()
    from nsa.bench.result import Result, when_and_where
    from nsa.bench.show import print_tables, write
    from nsa.bench.timing import device_facts, matrix_rate

    if arguments.output:
        there = arguments.output.with_name(arguments.output.name + ".json")
        if there.exists() and there.stat().st_size:
            raise ValueError(f"{there} is there already and would be lost; give another --output")
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        there.touch()  # not after the first measurement: a folder that cannot be written
    shape = {name: value for name, value in asdict(arguments).items() if name not in ("output", "json")}
    result = Result(bench=bench, facts=device_facts() | when_and_where(), shape=shape, matrix_rate=matrix_rate())
    for entry in arguments.measure():
        result.entries.append(entry)
        if arguments.output:
            there.write_text(result.to_json(), encoding="utf-8")
    if arguments.output:  # before anything is printed: a terminal may be gone by now
        write(result, arguments.output)
    if arguments.json:
        print(result.to_json())
    else:
        print_tables(result)
