"""The `nsa` command. Each subcommand is a file of `nsa.commands`, loaded when it is asked for."""

import contextlib
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import inspect
import io
import os
import re
import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nsa.out_of_memory import is_out_of_memory

# The file in nsa.commands, and what it does.
COMMANDS = {
    "train": "train a language model from scratch, NSA or one of its twins",
    "generate": "continue a prompt with a trained model",
    "info": "memory, keys read and decoding time of a model, planned",
    "serve": "an OpenAI server for a trained model, on vLLM",
    "eval": "judge models at long context: needle, recall, perplexity",
    "report": "training runs side by side, on one page",
    "compare": "attention methods side by side, at one budget",
    "convert": "make a dense checkpoint sparse: Llama, Qwen, Mistral, Phi, Gemma",
    "adapt": "train a converted model beside the dense one it came from",
    "corpus": "build a training corpus from packages, by name",
    "fetch": "fetch a real model to try things on",
    "bench": "time kernels, a layer, a training step or decoding on a GPU",
    "demo": "train three twins on this machine, judge them, write a report",
}

# What the parsers of files raise besides ValueError, by name, for their modules need not be loaded: safetensors, zip
# files, numpy's, and config.json with values of other types.
OF_FILES = (
    "SafetensorError", "BadZipFile", "EOFError", "StrictDataclassFieldValidationError",
    "StrictDataclassClassValidationError",
)  # fmt: skip

HELP = """usage: nsa COMMAND [--help] ...

Native Sparse Attention: train, generate, serve, judge.

{commands}

  nsa COMMAND --help      its options and examples
  nsa --version

options of every command:
  --traceback             show where an error was raised, not only its one line
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Returns:
        The exit code: 0; 2 for what a user can mend, with one line on stderr; 130 for Ctrl-C; 141 where the reader of
        the output went away, as after SIGPIPE; 1 for a fault of this program, with its traceback.
    """
    rest = list(sys.argv[1:] if arguments is None else arguments)
    name = rest[0] if rest and rest[0] in COMMANDS else ""
    who = f"nsa {name}".rstrip()
    show_traceback = "--traceback" in rest
    rest = [argument for argument in rest if argument != "--traceback"]
    _print_any_character()
    try:
        _run(rest)
        sys.stdout.flush()
    except KeyboardInterrupt as interruption:
        print(f"\n{who}: interrupted" + (f"; {interruption}" if str(interruption) else ""), file=sys.stderr)
        return 130
    except BrokenPipeError:
        _let_closed_pipes_be()
        return 141
    except SystemExit as stop:
        if not isinstance(stop.__context__, BrokenPipeError):  # which rich turns into an exit of its own
            raise
        return 141
    except Exception as error:
        said = explained(error)
        if said is None:
            traceback.print_exc()
            print(f"{who}: this is a fault of nsa; please report it with the lines above", file=sys.stderr)
            return 1
        if show_traceback:
            raise
        print(f"{who}: error: {said}", file=sys.stderr)
        return 2
    return 0


def _run(arguments: Sequence[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = (f"  {name:<10} {summary}" for name, summary in COMMANDS.items())
        print(HELP.format(commands="\n".join(lines)))
    elif arguments[0] == "--version":
        import nsa

        print(f"nsa {nsa.__version__}")
    elif arguments[0] in COMMANDS:
        _module(arguments[0]).run(parse(arguments[0], arguments[1:]))
    else:
        raise ValueError(f"unknown command {arguments[0]!r}; expected one of {', '.join(COMMANDS)}")


def _module(name: str) -> Any:
    return importlib.import_module(f"nsa.commands.{name}")


def parse(name: str, arguments: Sequence[str]) -> Any:
    """The arguments of a subcommand as its dataclass; ValueError in one line if they do not fit it."""
    import tyro

    module = _module(name)
    command = module.Arguments
    default = module.default_for(list(arguments)) if hasattr(module, "default_for") else tyro.MISSING_NONPROP
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed = tyro.cli(
                command,
                prog=f"nsa {name}",
                description=inspect.cleandoc(command.__doc__ or ""),
                args=list(arguments),
                default=default,
                config=(tyro.conf.HelptextFromCommentsOff,),  # a comment above a field is the heading of a section
            )
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        # tyro draws a box with a title around what it says; in ASCII, rules under the title and inside.
        frame = re.compile(r"\u256d.*|[\u2500-\u257f]+|\A.*\n *-{3,}|-{3,} *$", re.MULTILINE)
        raise ValueError(frame.sub(" ", said.getvalue())) from None
    return _at_home(parsed)


def _at_home(command: Any) -> Any:
    """Its paths with ~ and ~user expanded, which a shell leaves in --out=~/runs; unknown users stay as they are."""
    given = {field.name: getattr(command, field.name) for field in dataclasses.fields(command)}
    paths = {name: Path(os.path.expanduser(value)) for name, value in given.items() if isinstance(value, Path)}
    inner = {name: _at_home(value) for name, value in given.items() if dataclasses.is_dataclass(value)}
    return dataclasses.replace(command, **paths, **inner) if paths or inner else command


def explained(error: Exception) -> str | None:
    """One line on an error that arguments, files, memory or missing packages can cause; None for a fault of nsa."""
    if isinstance(error, ImportError):
        module = (error.name or "").partition(".")[0]
        if module == "nsa":
            return None
        needs = f"this needs the package {module}, which is not installed" if module else one_line(error)
        return f"{needs}: {how_to_install(module)}" if module else needs
    if is_out_of_memory(error):
        return f"out of memory: {one_line(error).partition(' Search for ')[0]}"  # after which the driver's advice comes
    if isinstance(error, ValueError | OSError) or type(error).__name__ in OF_FILES:
        return one_line(error)
    nested = isinstance(error, RecursionError) and "JSON" in str(error)
    return one_line(error) if nested or type(error) is Exception else None  # tokenizers raises the bare type


def one_line(error: BaseException) -> str:
    return re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__


def how_to_install(module: str) -> str:
    """The pip command for what is not here of the extra that brings `module`; nsa itself need be on no index."""
    extras: dict[str, list[str]] = {}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for line in importlib.metadata.requires("nsa") or ():
            requirement, _, marker = (part.strip() for part in line.partition(";"))
            extras.setdefault(marker, []).append(requirement)
    for requirements in sorted(extras.values(), key=len):  # the tools of development include all the others
        modules = {re.split(r"[^\w-]", requirement)[0].replace("-", "_"): requirement for requirement in requirements}
        if module in modules:
            missing = [requirement for name, requirement in modules.items() if name == module or not _is_here(name)]
            return f"pip install {shlex.join(missing)}"
    return f"pip install {module}"


def _is_here(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _print_any_character() -> None:
    """A locale that lacks a character shows its code in its place, and the work before is not lost."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _let_closed_pipes_be() -> None:
    """Python flushes both streams once more when it ends, and would complain."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    sys.exit(main())
