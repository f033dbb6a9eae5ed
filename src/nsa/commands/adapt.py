"""`nsa adapt`: what a converted model lost, won back."""

from nsa.adapting.arguments import AdaptArguments as Arguments


def run(arguments: Arguments) -> None:
    from nsa.adapting.adapt import adapt

    adapt(arguments)
