"""`nsa info`: what a model takes and reads, planned."""

from nsa.training.info import InfoConfig as Arguments


def run(arguments: Arguments) -> None:
    from nsa.training.info import show

    show(arguments)
