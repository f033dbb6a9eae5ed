"""`nsa convert`: a dense checkpoint made sparse."""

from dataclasses import replace
from typing import Any

import tyro

from nsa.adapting.arguments import ConvertArguments as Arguments
from nsa.adapting.arguments import default_sizes


def default_for(arguments: list[str]) -> Arguments:
    sizes: dict[str, Any] = default_sizes(arguments)
    return replace(Arguments(tyro.MISSING, tyro.MISSING), **sizes)


def run(arguments: Arguments) -> None:
    from nsa.adapting.convert import convert

    convert(arguments)
