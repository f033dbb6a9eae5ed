"""`nsa compare`: attention methods side by side."""

from nsa.eval.arguments import CompareArguments as Arguments


def run(arguments: Arguments) -> None:
    from nsa.eval.compare import compare

    compare(arguments)
