"""`nsa convert`: a dense checkpoint made sparse."""

import tyro

from nsa.adapting.arguments import ConvertArguments as Arguments
from nsa.adapting.arguments import default_sizes


def default_for(arguments: list[str]) -> Arguments:
    return Arguments(tyro.MISSING, tyro.MISSING, nsa=default_sizes(arguments))


def run(arguments: Arguments) -> None:
    from nsa.adapting.convert import convert

    convert(arguments)
