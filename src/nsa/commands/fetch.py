"""`nsa fetch`: a real model to try things on."""

from nsa.eval.arguments import FetchArguments as Arguments


def run(arguments: Arguments) -> None:
    from nsa.eval.fetch import fetch

    fetch(arguments)
