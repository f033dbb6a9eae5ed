"""`nsa train`: a language model from scratch."""

import os
import shlex
from dataclasses import replace

from nsa.training.config import TrainConfig as Arguments
from nsa.training.folder import CONFIG_FILE, at_home
from nsa.training.presets import preset


def default_for(arguments: list[str]) -> Arguments:
    """What the other flags of a command line then change: the named preset, or the run that is to be continued."""
    name, out = _value(arguments, "--preset"), at_home(_value(arguments, "--out") or Arguments.out)
    if "--resume" in arguments and name is None and (out / CONFIG_FILE).exists():
        return replace(Arguments.load(out), out=out)
    return preset(name or "demo")


def run(arguments: Arguments) -> None:
    from nsa.training.train import train

    train(arguments)
    if os.environ.get("RANK", "0") != "0":  # the first of several processes speaks
        return
    command = f"nsa generate {shlex.quote(str(arguments.out))} --prompt 'def '"
    print(f"The model lies in {arguments.out}. It continues a text:\n  {command}")


def _value(arguments: list[str], flag: str) -> str | None:
    """What a command line says after a flag, the last time."""
    found = None
    for place, argument in enumerate(arguments):
        if argument == flag:
            found = next(iter(arguments[place + 1 :]), None)
        elif argument.startswith(f"{flag}="):
            found = argument.removeprefix(f"{flag}=")
    return found
