"""The report's charts, with their headings, from results and training curves."""

from collections.abc import Mapping

from markupsafe import Markup

from nsa.eval.compare_table import LOSSES, quality_of
from nsa.eval.costs import Costs
from nsa.eval.pictures import CURVES, Curve, KeysRead
from nsa.eval.regions import BEYOND, INSIDE, OUT_OF_REACH
from nsa.eval.result import Result, paired_difference
from nsa.eval.table import own_and_shared
from nsa.eval.tasks import Perplexity
from nsa.report import charts
from nsa.report.charts import Charts, Series, draw

Colors = Mapping[str, str]


def colors_of(result: Result) -> dict[str, str]:
    """The twins keep their colours everywhere."""
    return charts.colors_of((model["name"], model["attention"]) for model in result.models)


def curve_charts(curves: Mapping[str, Curve], colors: Colors) -> Charts:
    """Training loss and, where they were measured, the losses on held-out text and on values to be recalled."""
    found: Charts = []
    for loss, title in CURVES.items():
        series = [
            Series(name=name, color=colors[name], x=[*own], y=[*own.values()], dots=loss != "loss")
            for name, curve in curves.items()
            if (own := curve.losses.get(loss))
        ]
        if series:
            found.append((title, draw(series, title=title, x_label="step", y_label="nats per token")))
    return found


def context_charts(result: Result, colors: Colors) -> Charts:
    """Recall by distance, and loss by position."""
    found: Charts = []
    if "recall" in result.tasks:
        rows = {name: result.of_task(name, "recall") for name in result.names}
        columns, shared = own_and_shared([row.where for row in next(iter(rows.values()))])
        columns = [short_places(column) for column in columns]
        series = []
        for name, own in rows.items():
            x = [place for place, row in enumerate(own) if row.n]
            y, low, high = ([getattr(own[place], of) for place in x] for of in ("value", "low", "high"))
            series.append(Series(name=name, color=colors[name], x=x, y=y, low=low, high=high, line=False))
        title = f"Recall: {shared}" if shared else "Recall"
        found.append((title, draw(series, title=title, y_label="exact match", columns=columns, shares=True)))
    return found + (losses_by_position(result, colors) if "perplexity" in result.tasks else [])


def short_places(name: str) -> str:
    """As a column of a chart has room for."""
    for place, short in ((OUT_OF_REACH, "out of reach"), (BEYOND, "beyond window"), (INSIDE, "in window")):
        name = name.replace(place, short)
    return name


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
    found: Charts = []
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
        found.append((title, draw(series, title=title, x_label="tokens seen", y_label=unit, log="x")))
    return found


def quality_charts(result: Result, costs: Costs, colors: Colors) -> Charts:
    """Of every task and length: what each method finds against the keys that a query reads."""
    found: Charts = []
    for task in result.tasks:
        quality = quality_of(result, task)
        phase = "prefill" if task == Perplexity.name else "decode"
        unit = next(row.unit for name in result.names for row in result.of_task(name, task))
        for length in sorted({length for _, length in quality}):
            dots = []
            for cost in costs.rows:
                own, keys = quality.get((cost.method, length)), cost.keys(phase)
                if cost.length == length and own is not None and keys:
                    dots.append(
                        Series(name=cost.method, color=colors[cost.method], x=[keys], y=[own.value], low=[own.low],
                               high=[own.high], line=False)
                    )  # fmt: skip
            title, label = f"{task} at {length:,} tokens", f"keys read by one query in {phase}, to choose included"
            shares = task not in LOSSES
            chart = draw(dots, title=title, x_label=label, y_label=unit, log="x", shares=shares, names="beside")
            found.append((title, chart))
    return found


def keys_legend(read: KeysRead) -> list[tuple[str, str]]:
    """Twins and the model's own method, each with its colour."""
    return [("dense", "var(--dense)"), ("window", "var(--window)"), (read.attention, "var(--nsa)")]


def keys_chart(read: KeysRead) -> Markup:
    """Keys read by one query against the context: the formula of the three twins, and counts in the model."""
    contexts = [2**e for e in range(5, 17)]
    series = [
        Series(name=attention, color=color, x=contexts, y=[read.formula(attention, c) for c in contexts])
        for attention, color in keys_legend(read)
    ]
    name = f"{read.model}, counted"
    series.append(Series(name=name, color="var(--nsa)", x=read.contexts, y=read.counted, line=False))
    title, y_label = "keys read per query", "keys read by one query"
    return draw(series, title=title, x_label="context in tokens", y_label=y_label, log="xy")
