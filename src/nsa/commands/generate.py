"""`nsa generate`: a model continues a prompt."""

from nsa.training.generation import GenerateConfig as Arguments


def run(arguments: Arguments) -> None:
    from nsa.training.generation import generate

    generate(arguments)
