"""`nsa corpus`: a training corpus from packages."""

from nsa.training.building.arguments import CorpusArguments as Arguments


def run(arguments: Arguments) -> None:
    from nsa.training.building.build import build

    build(arguments)
