"""`nsa serve`: an OpenAI server for an NSA model."""

from nsa.serving.arguments import ServeArguments as Arguments


def run(arguments: Arguments) -> None:
    from nsa.serving.serve import serve

    serve(arguments)
