"""`nsa report`: training runs on one page."""

from nsa.eval.arguments import ReportArguments as Arguments


def run(arguments: Arguments) -> None:
    from nsa.eval.recipes_report import report

    report(arguments)
