"""`nsa demo`: three twins trained here, judged, and a report."""

from nsa.eval.arguments import DemoArguments as Arguments


def run(arguments: Arguments) -> None:
    from nsa.eval.demo import demo

    demo(arguments)
