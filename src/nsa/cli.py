"""The `nsa` command. Each subcommand is a frozen dataclass with a `run` method, loaded when it is asked for."""

import contextlib
import importlib
import importlib.metadata
import inspect
import io
import re
import sys
from collections.abc import Sequence
from typing import Any

# name: (the module and class of its arguments, what it does)
COMMANDS = {
    "train": ("nsa.training.config:TrainConfig", "train a language model from scratch, NSA or one of its twins"),
    "generate": ("nsa.training.generation:GenerateConfig", "continue a prompt with a trained model"),
    "info": ("nsa.training.info:InfoConfig", "memory, keys read and decoding time of a model, planned"),
    "eval": ("nsa.eval.command:EvalArguments", "judge models at long context: needle, recall, perplexity"),
    "compare": ("nsa.eval.compare_command:CompareArguments", "attention methods side by side, at one budget"),
    "corpus": ("nsa.training.building.command:CorpusArguments", "build a training corpus from packages, by name"),
    "fetch": ("nsa.eval.compare_command:FetchArguments", "fetch a real model to try things on"),
    "bench": ("nsa.bench.command:BenchArguments", "time kernels, a layer, a training step or decoding on a GPU"),
    "demo": ("nsa.eval.command:DemoArguments", "train three twins on this machine, judge them, write a report"),
}

HELP = """usage: nsa COMMAND [--help] ...

Native Sparse Attention: train, generate, judge.

{commands}

  nsa COMMAND --help      its options and examples
  nsa --version

options of every command:
  --traceback             show where an error was raised, not only its one line
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code: 0, 2 for a user's error (one line on stderr), 130 for Ctrl-C."""
    rest = list(sys.argv[1:] if arguments is None else arguments)
    if not rest or rest[0] in ("-h", "--help"):
        lines = (f"  {name:<10} {summary}" for name, (_, summary) in COMMANDS.items())
        print(HELP.format(commands="\n".join(lines)))
        return 0
    if rest[0] == "--version":
        print(f"nsa {importlib.metadata.version('nsa')}")
        return 0
    name = rest.pop(0)
    if name not in COMMANDS:
        print(f"nsa: error: unknown command {name!r}; expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    traceback = "--traceback" in rest
    rest = [argument for argument in rest if argument != "--traceback"]
    try:
        parse(name, rest).run()
    except KeyboardInterrupt as interruption:
        print(f"\nnsa {name}: {interruption or 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        sys.stderr.close()
        return 0
    except (ValueError, OSError) as error:
        if traceback:
            raise
        print(f"nsa {name}: error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def parse(name: str, arguments: Sequence[str]) -> Any:
    """The arguments of a subcommand as its dataclass; ValueError in one line if they do not fit it."""
    import tyro

    module, _, class_name = COMMANDS[name][0].partition(":")
    command = getattr(importlib.import_module(module), class_name)
    default = command.default_for(list(arguments)) if hasattr(command, "default_for") else tyro.MISSING_NONPROP
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                command,
                prog=f"nsa {name}",
                description=inspect.cleandoc(command.__doc__ or ""),
                args=list(arguments),
                default=default,
            )
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        # tyro draws a box with a title around what it says; in ASCII, rules under the title and inside.
        frame = re.compile(r"\u256d.*|[\u2500-\u257f]+|\A.*\n *-{3,}|-{3,} *$", re.MULTILINE)
        raise ValueError(frame.sub(" ", said.getvalue())) from None


def one_line(error: BaseException) -> str:
    return re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
