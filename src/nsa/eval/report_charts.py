"""The report's charts, each a list of (heading, SVG), from results and training curves."""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from nsa.eval.blocks import keys_per_query
from nsa.eval.compare_table import LOSSES, quality_of
from nsa.eval.costs import Costs
from nsa.eval.pictures import Curve, KeysRead
from nsa.eval.result import Result, paired_difference
from nsa.eval.table import own_and_shared
from nsa.eval.tasks import Perplexity
from nsa.report.charts import Point, Series, interval_chart, line_chart, point_chart

Colors = Mapping[str, str]
Charts = list[tuple[str, str]]


def colors_of(result: Result) -> dict[str, str]:
    """The twins keep their colours everywhere; other models take the remaining ones in turn."""
    colors: dict[str, str] = {}
    others = 0
    for model in result.models:
        color = f"var(--{model['attention']})" if model["attention"] in ("nsa", "dense", "window") else ""
        if not color or color in colors.values():
            color, others = f"var(--other-{others % 8})", others + 1
        colors[model["name"]] = color
    return colors


def curve_charts(curves: Mapping[str, Curve], colors: Colors) -> Charts:
    """Training loss and, where they were measured, the losses on held-out text and on values to be recalled."""
    lines = {
        "While training": [(n, c.steps, c.losses, False) for n, c in curves.items()],
        "On held-out text": [(n, c.held_out_steps, c.held_out_losses, True) for n, c in curves.items()],
        "On values to be recalled": [(n, c.retrieval_steps, c.retrieval_losses, True) for n, c in curves.items()],
    }
    charts = []
    for title, own in lines.items():
        series = [Series(name=n, color=colors[n], x=x, y=y, dots=dots) for n, x, y, dots in own if x]
        if series:
            charts.append((title, line_chart(series, title=title, x_label="step", y_label="nats per token")))
    return marked(charts)


def context_charts(result: Result, colors: Colors) -> Charts:
    """Recall by distance, and loss by position."""
    charts = []
    if "recall" in result.tasks:
        rows = {name: result.of_task(name, "recall") for name in result.names}
        names, shared = own_and_shared([row.where for row in next(iter(rows.values()))])
        series = []
        for name, own in rows.items():
            found = [(place, row) for place, row in enumerate(own) if row.n]
            x, y = [place for place, _ in found], [row.value for _, row in found]
            low, high = [row.low for _, row in found], [row.high for _, row in found]
            series.append(Series(name=name, color=colors[name], x=x, y=y, low=low, high=high))
        title = f"Recall: {shared}" if shared else "Recall"
        charts.append((title, interval_chart(names, series, title=title, y_label="exact match")))
    return marked(charts) + (losses_by_position(result, colors) if "perplexity" in result.tasks else [])


def losses_by_position(result: Result, colors: Colors) -> Charts:
    """A chart a length. More than three models would hide one another behind what the texts differ by: of them it is
    the paired difference from the reference."""
    buckets = {
        name: [r for r in result.of_task(name, "perplexity") if r.where["positions"] != "all" and r.n]
        for name in result.names
    }
    lengths = sorted({row.where["length"] for rows in buckets.values() for row in rows})
    reference = result.reference if len(result.names) > 3 else None
    truth = {str(row.where): row for row in buckets[reference]} if reference else {}
    charts = []
    for length in lengths:
        series = []
        for name, rows in buckets.items():
            own = [r for r in rows if r.where["length"] == length and (not reference or str(r.where) in truth)]
            pairs = [paired_difference(r, truth[str(r.where)]) if reference else (r.value, r.error) for r in own]
            middles = [(r.where["positions"][0] * r.where["positions"][1]) ** 0.5 for r in own]
            series.append(
                Series(name=name, color=colors[name], x=middles, y=[y for y, _ in pairs], dots=True,
                       low=[y - error for y, error in pairs], high=[y + error for y, error in pairs])
            )  # fmt: skip
        title = "Held-out loss by position" + (f", {length:,} tokens" if len(lengths) > 1 else "")
        unit = f"nats per token above {reference}" if reference else "nats per token"
        charts.append((title, line_chart(series, title=title, x_label="tokens seen", y_label=unit, log_x=True)))
    return marked(charts)


def quality_charts(result: Result, costs: Costs, colors: Colors) -> Charts:
    """Of every task and length: what each method finds against the keys that a query reads."""
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
    return marked(charts)


def keys_chart(read: KeysRead, longest: int = 65_536) -> str:
    """Keys read by one query against the context: the formula of the three twins, and counts in the model."""
    contexts = [2**e for e in range(5, longest.bit_length())]
    series = [
        Series(name=attention, color=f"var(--{attention})", x=contexts,
               y=[keys_per_query(attention, read.config, c) for c in contexts])
        for attention in ("dense", "window", "nsa")
    ]  # fmt: skip
    name = f"{read.model}, counted"
    series.append(Series(name=name, color="var(--nsa)", x=read.contexts, y=read.counted, dots=True, line=False))
    labels: Any = {"title": "keys read per query", "x_label": "context in tokens", "y_label": "keys read by one query"}
    return Markup(line_chart(series, **labels, log_x=True, log_y=True))


def marked(charts: Charts) -> Charts:
    """Charts are markup already, which a page does not escape."""
    return [(title, Markup(chart)) for title, chart in charts]
