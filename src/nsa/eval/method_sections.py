"""The report's section of a comparison of methods: what each finds against what it reads, and what it costs."""

from html import escape

from nsa.eval.compare_table import LOSSES, quality_of
from nsa.eval.costs import HEADS, Costs
from nsa.eval.point_chart import Point, point_chart
from nsa.eval.result import Result
from nsa.eval.sections import Colors, section
from nsa.eval.tasks import Perplexity


def quality_and_costs(result: Result, costs: Costs | None, colors: Colors) -> str:
    """The section; empty without costs."""
    if costs is None:
        return ""
    charts = quality_charts(result, costs, colors)
    cards = [f'<div class="card"><h3>{escape(title)}</h3>{chart}</div>' for title, chart in charts]
    text = "One dot a method: the task's mean over its rows, with its 95% interval, against the keys that a query "
    text += "reads, those read only to choose included (the table has them apart, prefill + decode). A loss's whiskers "
    text += "are those of its paired difference from the reference. Keys are counted while running, on average over "
    text += "queries, layers and query heads. Times are those of this library's torch operations, not of a method's "
    text += "own kernels."
    body = f'<div class="grid-of">{"".join(cards)}</div>' + costs_html(costs, colors)
    return section("costs", "Quality and cost", text, body)


def costs_html(costs: Costs, colors: Colors) -> str:
    """The table of the terminal, and each method's sizes."""
    heads = "".join(f"<th>{escape(head)}</th>" for head in HEADS)
    rows = []
    for length in costs.lengths():
        rows.append(f'<tr class="head"><td colspan="{len(HEADS) + 1}">{length:,} tokens</td></tr>')
        for cost in costs.rows:
            if cost.length == length:
                dot = f'<span class="dot" style="background:{colors.get(cost.method, "var(--faint)")}"></span>'
                cells = "".join(f"<td>{escape(cell)}</td>" for cell in cost.cells())
                rows.append(f"<tr><td>{dot}{escape(cost.method)}</td>{cells}</tr>")
    sizes = []
    for cost in costs.rows:
        phases = "sparse in " + " and ".join(cost.sparse_in) if cost.sparse_in else "dense"
        listed = ", ".join(f"{key} = {value}" for key, value in cost.sizes.items())
        if cost.patterns:
            listed += "; heads: " + ", ".join(f"{count} {name}" for name, count in sorted(cost.patterns.items()))
        paper = "arXiv:" + cost.paper.rsplit("/", 1)[-1]
        details = "; ".join(filter(None, [phases, listed, paper]))
        sizes.append(f"<dt>{escape(cost.method)} at {cost.length:,}</dt><dd>{escape(details)}</dd>")
    return (
        f'<div class="card scroll"><table><thead><tr><th></th>{heads}</tr></thead><tbody>{"".join(rows)}</tbody>'
        f'</table></div><div class="card keys"><h3>Sizes at this budget</h3><dl>{"".join(sizes)}</dl></div>'
    )


def quality_charts(result: Result, costs: Costs, colors: Colors) -> list[tuple[str, str]]:
    """(heading, chart) of every task and length: what each method finds against the keys that a query reads."""
    charts = []
    for task in result.tasks:
        quality = quality_of(result, task)
        phase = "prefill" if task == Perplexity.name else "decode"
        for length in sorted({length for _, length in quality}):
            points = []
            for cost in costs.rows:
                found, keys = quality.get((cost.method, length)), cost.keys(phase)
                if cost.length == length and found is not None and keys:
                    points.append(
                        Point(name=cost.method, color=colors[cost.method], x=keys, y=found.value, low=found.low,
                              high=found.high)
                    )  # fmt: skip
            unit = next(row.unit for name in result.names for row in result.of_task(name, task))
            title = f"{task} at {length:,} tokens"
            label = f"keys read by one query in {phase}, to choose included"
            shares = None if task in LOSSES else (0.0, 1.0)
            charts.append((title, point_chart(points, title=title, x_label=label, y_label=unit, y_range=shares)))
    return charts
