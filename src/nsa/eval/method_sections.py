"""The report's section of a comparison of methods: what each finds against what it reads, and what it costs."""

from collections.abc import Mapping
from html import escape

from nsa.eval.compare_table import quality_of
from nsa.eval.costs import HEADS, Costs
from nsa.eval.result import Result
from nsa.eval.sections import Colors, legend, section
from nsa.eval.svg import Series, line_chart
from nsa.eval.tasks import Perplexity


def quality_and_costs(result: Result, costs: Costs | None, colors: Colors) -> str:
    """The section; empty without costs."""
    if costs is None:
        return ""
    cards = []
    for task in result.tasks:
        quality = quality_of(result, task)
        if quality:
            phase = "prefill" if task == Perplexity.name else "decode"
            unit = next(row.unit for name in result.names for row in result.of_task(name, task))
            title = f"{task}: quality against keys read"
            chart = quality_chart(costs, quality, colors, title=title, y_label=unit, phase=phase)
            cards.append(f'<div class="card"><h3>{escape(title)}</h3>{chart}</div>')
    text = "One dot a method and length, named when pointed at: the task's mean over its rows against the keys that a "
    text += "query reads, those read only to choose included (the table has them apart, prefill + decode). Keys are "
    text += "counted while running, on average over queries, layers and query heads. Times are those of this library's "
    text += "torch operations, not of a method's own kernels."
    body = legend(colors) + f'<div class="grid-of">{"".join(cards)}</div>' + costs_html(costs, colors)
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


def quality_chart(
    costs: Costs, quality: Mapping[tuple[str, int], float], colors: Colors, *, title: str, y_label: str, phase: str
) -> str:
    """One dot a method and length: what it found against the keys that a query of `phase` read."""
    series = []
    for name in dict.fromkeys(cost.method for cost in costs.rows):
        own = [c for c in costs.rows if c.method == name and (name, c.length) in quality and c.keys(phase)]
        x, y = [c.keys(phase) or 0.0 for c in own], [quality[name, c.length] for c in own]
        series.append(Series(name=name, color=colors[name], x=x, y=y, dots=True, line=False))
    label = f"keys read by one query in {phase}, those read to choose included"
    return line_chart(series, title=title, x_label=label, y_label=y_label, log_x=True)
