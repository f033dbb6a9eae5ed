"""`nsa eval`: models judged at long context."""

from nsa.eval.arguments import EvalArguments as Arguments


def run(arguments: Arguments) -> None:
    from nsa.eval.runner import judge

    judge(arguments)
