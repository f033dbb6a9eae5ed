"""The sections of the report, each a function from results to HTML."""

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from nsa.eval.blocks import keys_per_query
from nsa.eval.maps import block_strip, heat_map, marked_text
from nsa.eval.pictures import BlockPicture, Curve, KeysRead
from nsa.eval.result import Result, paired_difference
from nsa.eval.svg import Series, format_number, interval_chart, line_chart
from nsa.eval.table import blocks_of, own_and_shared

Colors = Mapping[str, str]


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


def legend(colors: Colors) -> str:
    return _legend((name, color) for name, color in colors.items())


def table(result: Result, colors: Colors) -> str:
    """The same lines as the terminal's table; the detail of a value stands small below it."""
    heads = "".join(
        f'<th><span class="dot" style="background:{colors[name]}"></span>{escape(name)}</th>' for name in result.names
    )
    rows = []
    for block in blocks_of(result):
        rows.append(f'<tr class="head"><td colspan="{len(result.names) + 1}">{escape(block.title)}</td></tr>')
        for line in block.lines:
            cells = "".join(f"<td>{escape(v)}<small>{_typeset(detail)}</small></td>" for v, detail in line.cells)
            rows.append(f"<tr><td>{escape(line.where)}</td>{cells}</tr>")
    dense = ' class="dense"' if len(result.names) > 5 else ""
    text = "Exact match of greedy answers: right answers of all, and the 95% Wilson interval. "
    text += "Losses in nats per token with their standard error over sequences"
    reference = escape(result.reference or "")
    text += f"; beside {reference}, the paired difference and its standard error." if reference else "."
    return section(
        "results",
        "Results",
        text,
        f'<div class="card scroll"><table{dense}><thead><tr><th></th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>",
    )


def curves(all_curves: Mapping[str, Curve], colors: Colors) -> str:
    """Training loss and, where they were measured, the losses on held-out text and on values to be recalled."""
    shown = {name: curve for name, curve in all_curves.items() if curve.steps or curve.held_out_steps}
    if not shown:
        return ""
    charts = {
        "While training": [(n, c.steps, c.losses, False) for n, c in shown.items()],
        "On held-out text": [(n, c.held_out_steps, c.held_out_losses, True) for n, c in shown.items()],
        "On values to be recalled": [(n, c.retrieval_steps, c.retrieval_losses, True) for n, c in shown.items()],
    }
    cards = []
    for title, lines in charts.items():
        series = [Series(name=n, color=colors[n], x=x, y=y, dots=dots) for n, x, y, dots in lines]
        if any(len(s.x) for s in series):
            cards.append(_card(title, line_chart(series, title=title, x_label="step", y_label="nats per token")))
    text = "Twins see the same data in the same order, with the same steps and learning rate."
    hint = "The training loss follows what the rows hold: it jumps where the curriculum goes on to other rows. The "
    hint += "held-out losses are of text, and of values to be recalled, at the full length and from the start on."
    cards.append(f'<div class="card"><h3>Reading the curves</h3><p>{hint}</p></div>')
    return section("curves", "Loss curves", text, legend({n: colors[n] for n in shown}) + _grid(cards))


def long_context(result: Result, colors: Colors) -> str:
    """Recall by distance, and loss by position."""
    cards = []
    if "recall" in result.tasks:
        rows = {name: result.of_task(name, "recall") for name in result.names}
        names, shared = own_and_shared([row.where for row in next(iter(rows.values()))])
        series = []
        for name, own in rows.items():
            places = [place for place, row in enumerate(own) if row.n]
            found = [own[place] for place in places]
            series.append(
                Series(name=name, color=colors[name], x=places, y=[r.value for r in found],
                       low=[r.low for r in found], high=[r.high for r in found])
            )  # fmt: skip
        title = f"Recall: {shared}" if shared else "Recall"
        cards.append(_card(title, interval_chart(names, series, title=title, y_label="exact match")))
    if "perplexity" in result.tasks:
        cards += [_card(title, chart) for title, chart in losses_by_position(result, colors)]
    if not cards:
        return ""
    text = "Does the model find a value defined far above, and does text become easier the more of it has been seen? "
    text += "Whiskers are 95% Wilson intervals; the band is one standard error over sequences."
    return section("context", "What it gets from its context", text, legend(colors) + _grid(cards))


def losses_by_position(result: Result, colors: Colors) -> list[tuple[str, str]]:
    """(title, chart) of each length. More than three models would hide one another behind what the texts differ by:
    of them it is the paired difference from the reference."""
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
    return charts


def needles(result: Result) -> str:
    """One heat map a model, side by side."""
    if "needle" not in result.tasks:
        return ""
    cards = []
    for name in result.names:
        rows = [row for row in result.of_task(name, "needle") if row.n]
        if not rows:
            continue
        scores = {(row.where["length"], row.where["depth"]): (row.correct or 0, row.n) for row in rows}
        cards.append(_card(name, heat_map(scores, title=f"needle heat map of {name}")))
    n = max((row.n for name in result.names for row in result.of_task(name, "needle")), default=0)
    text = f"One definition planted in held-out text and asked for at the end: {n} prompts a cell, the same for every "
    text += "model. Depth 0% is the start of the text, farthest from the question; lengths are exact, in tokens."
    return section("needle", "Needle in a haystack", text, _grid(cards, "three"))


def blocks(picture: BlockPicture | None) -> str:
    """Which blocks the last query selected, per layer and group, along the text; and the text."""
    if picture is None:
        return ""
    length, size = len(picture.pieces), picture.block_size
    rows = [
        f'<div class="name">{escape(head.name)}</div>'
        + block_strip(
            head.scores,
            head.selected,
            head.forced,
            block_size=size,
            num_tokens=length,
            needle=picture.needle,
        )
        for head in picture.heads
    ]
    middle = 100 * sum(picture.needle) / 2 / length
    edge = "first" if middle < 6 else "last" if middle > 94 else ""
    ruler = (
        '<div class="name corner"></div><div class="ruler"><span class="first">0</span>'
        f'<span style="left:50%">{format_number(length // 2)}</span>'
        f'<span class="last" style="left:100%">{format_number(length)} tokens</span>'
        f'<span class="point {edge}" style="left:{middle:.1f}%">▲ needle</span></div>'
    )
    marks = _legend([
        ("block score (darker is higher)", "rgba(var(--nsa-rgb),.45)"), ("selected by its score", "var(--nsa)"),
        ("always selected (first and own blocks)", "var(--faint)"), ("the needle", "var(--needle)"),
    ])  # fmt: skip
    text = (
        f"After these {length:,} tokens the model must answer <code>{escape(picture.answer.strip())}</code>. "
        f"Each of the model's layers and KV head groups scores all blocks of {size} tokens and attends to the best: "
        f"{picture.found} of {len(picture.heads)} selected the needle's block. "
        f"The window alone reaches {picture.window_size} tokens back."
    )
    strips = f'<div class="strips">{"".join(rows)}{ruler}</div>'
    body = f'<div class="card"><h3>Scores and selected blocks</h3>{marks}{strips}</div>'
    shown = marked_text(picture.pieces, picture.counts, top=len(picture.heads), needle=picture.needle, block_size=size)
    explain = "Shaded: selected by score, the darker the more layers and groups chose it. Yellow: the needle."
    body += f'<div class="card keys"><h3>The same, in the text</h3><p>{explain}</p>{shown}</div>'
    return section("blocks", "What one query selected", text, body)


def keys_read(read: KeysRead | None, longest: int = 65_536) -> str:
    """Keys read by one query against the context: the formula of the three twins, and counts in the model."""
    if read is None:
        return ""
    contexts = [2**e for e in range(5, longest.bit_length())]
    series = [
        Series(name=attention, color=f"var(--{attention})", x=contexts,
               y=[keys_per_query(attention, read.config, c) for c in contexts], dash=dash)
        for attention, dash in (("dense", ""), ("window", ""), ("nsa", ""))
    ]  # fmt: skip
    name = f"{read.model}, counted"
    series.append(Series(name=name, color="var(--nsa)", x=read.contexts, y=read.counted, dots=True, line=False))
    chart = line_chart(
        series,
        title="keys read per query",
        x_label="context in tokens",
        y_label="keys read by one query",
        log_x=True,
        log_y=True,
    )
    cells = []
    for context, counted in zip(read.contexts, read.counted, strict=True):
        values = [keys_per_query(a, read.config, context) for a in ("dense", "window", "nsa")]
        numbers = "".join(f"<td>{value:,}</td>" for value in values)
        cells.append(f"<tr><td>{context:,}</td>{numbers}<td>{counted:,.1f}</td></tr>")
    head = "<th>context</th><th>dense</th><th>window</th><th>NSA</th><th>counted</th>"
    listing = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(cells)}</tbody></table></div>'
    c = read.config
    text = (
        f"NSA reads s/d + n·l′ + w keys at context s: here d = {c.compress_stride}, n = {c.num_selected_blocks}, "
        f"l′ = {c.select_block_size}, w = {c.window_size}, compressed keys counted as one each. "
        "Lines are this formula, cut to the keys that exist; dots are counted from the blocks that the queries of "
        "the prompt above selected."
    )
    names = legend({"dense": "var(--dense)", "window": "var(--window)", "nsa": "var(--nsa)"})
    return section("keys", "Keys read per query", text, names + _grid([_card("", chart), _card("", listing)]))


def samples(texts: Mapping[str, tuple[str, str]], colors: Colors) -> str:
    """Generated text, the prompt in grey."""
    if not texts:
        return ""
    cards = [
        f'<div class="card"><h3>{escape(name)}</h3><pre class="sample"><span class="given">{escape(prompt)}</span>'
        f"{escape(text)}</pre></div>"
        for name, (prompt, text) in texts.items()
    ]
    text = "Continuations of the same prompt (grey)."
    return section("sample", "A sample of generated text", text, _grid(cards, "three"))


def what_was_run(result: Result) -> str:
    """Command, date, versions, hardware, models and the tasks' parameters: the origin of every number."""
    run = result.run
    items: list[tuple[str, str]] = []
    if run:
        hardware = run["hardware"]
        threads = f"{hardware['threads']} threads"
        devices = [hardware["device"], hardware["system"]]
        items += [
            ("command", f"<code>{escape(run['command'])}</code>"),
            ("date", escape(run["date"])),
            ("versions", escape(", ".join(f"{name} {number}" for name, number in run["versions"].items()))),
            ("hardware", escape(", ".join(filter(None, [hardware["processor"], threads, *devices])))),
        ]
    for model in result.models:
        sizes = f"{model['num_parameters']:,} parameters, {model['num_layers']} layers"
        details = f"{model['attention']} attention, {sizes}, vocabulary of {model['vocab_size']:,}"
        if model["attention"] in ("nsa", "window") and model["nsa"]:
            details += "; " + _parameters(model["nsa"])
        items.append((escape(model["name"]), f"{escape(details)}<br><code>{escape(model['folder'])}</code>"))
    items += [(escape(task), escape(_parameters(values))) for task, values in result.tasks.items()]
    listed = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in items)
    notes = "".join(f"<li>{escape(note)}</li>" for note in result.notes)
    notes = f'<ul class="notes">{notes}</ul>' if notes else ""
    return section("run", "What was run", "", f'<div class="card"><dl>{listed}</dl>{notes}</div>')


def section(name: str, title: str, text: str, body: str) -> str:
    paragraph = f"<p>{text}</p>" if text else ""
    return f'<section id="{name}"><h2>{escape(title)}</h2>{paragraph}{body}</section>'


def _typeset(detail: str) -> str:
    """Ranges and minus signs as in print, and where a narrow column may not break them."""
    ranges = re.sub(r"(?<=\d)-(?=\d)", "\u2060\u2013\u2060", escape(detail))
    return ranges.replace("-", "\u2212").replace("± ", "±\u00a0")


def _card(title: str, body: str) -> str:
    heading = f"<h3>{escape(title)}</h3>" if title else ""
    return f'<div class="card">{heading}{body}</div>'


def _grid(cards: Sequence[str], css: str = "") -> str:
    return f'<div class="grid-of {css}">{"".join(cards)}</div>'


def _legend(entries: Any) -> str:
    spans = "".join(f'<span><i style="background:{color}"></i>{escape(name)}</span>' for name, color in entries)
    return f'<div class="legend">{spans}</div>'


def _parameters(values: Mapping[str, Any]) -> str:
    shown = []
    for key, value in values.items():
        if isinstance(value, list | tuple):
            value = " ".join(str(v) for v in value)
        shown.append(f"{key} = {value}")
    return ", ".join(shown)
