"""What every bench does: see that its sizes can be, measure, write down after every measurement, show."""

import importlib
from dataclasses import asdict

from nsa.bench.arguments import (
    DecodeArguments,
    GenerateArguments,
    KernelArguments,
    Measured,
    ModuleArguments,
    StepArguments,
    TrainArguments,
    ValueWidth,
)  # fmt: skip
from nsa.bench.checks import check
from nsa.files import write_whole

# What a bench is called in its result, and the file that has its `measure`, loaded once a GPU is known to be there.
BENCHES: dict[type, tuple[str, str]] = {
    KernelArguments: ("kernels", "nsa.bench.kernels"),
    ModuleArguments: ("module", "nsa.bench.layer"),
    StepArguments: ("step", "nsa.bench.step"),
    TrainArguments: ("train", "nsa.bench.train"),
    DecodeArguments: ("decode", "nsa.bench.decode"),
    GenerateArguments: ("generate", "nsa.bench.generate"),
}


def run(arguments: Measured) -> None:
    """Measure, write down after every entry, show."""
    check(arguments)
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
    name, module = BENCHES[type(arguments)]
    shape = {name: value for name, value in asdict(arguments).items() if name not in ("output", "json")}
    if isinstance(arguments, ValueWidth):
        shape["value_dim"] = arguments.e
    result = Result(bench=name, facts=device_facts() | when_and_where(), shape=shape, matrix_rate=matrix_rate())
    for entry in importlib.import_module(module).measure(arguments):
        result.entries.append(entry)
        if arguments.output:
            write_whole(there, result.to_json())
    if arguments.output:  # before anything is printed: a terminal may be gone by now
        write(result, arguments.output)
    if arguments.json:
        print(result.to_json())
    else:
        print_tables(result)
