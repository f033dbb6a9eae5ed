"""Charts as SVG through matplotlib: letters stay text, colours are the page's CSS variables, light or dark.

A chart is a string with a viewBox and no fixed size, so that the page lays it out. Colours are given as CSS, of which
`var(--nsa)` and the other variables of page.css are drawn in their light value and put back into the picture.
"""

import io
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from textwrap import wrap
from typing import Any, cast
from xml.etree import ElementTree

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from nsa.report.table import format_number

WIDTH, HEIGHT = 520, 330  # of the viewBox
LEFT, RIGHT, TOP, BOTTOM = 64, 14, 14, 46
NAMES = 104  # at the right edge, for the names of points
NAME_HEIGHT = 15.0
STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "nsa", "text.parse_math": False}
CSS = files("nsa.report").joinpath("page.css").read_text(encoding="utf-8")
LIGHT = {f"var(--{name})": value for name, value in re.findall(r"--([\w-]+): (#\w{6});", CSS[: CSS.index("}")])}
SVG = "{http://www.w3.org/2000/svg}"


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line, or one set of points, of a chart; `low` and `high` are its error band or its whiskers."""

    name: str
    color: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    dots: bool = False
    line: bool = True
    dash: str = "-"


@dataclass(frozen=True, kw_only=True)
class Point:
    """A dot with its 95% interval; NaN bounds for none."""

    name: str
    color: str
    x: float
    y: float
    low: float = math.nan
    high: float = math.nan


@matplotlib.rc_context(STYLE)
def line_chart(
    series: Sequence[Series], *, title: str, x_label: str, y_label: str, log_x: bool = False, log_y: bool = False,
    named: bool = False,
) -> str:  # fmt: skip
    """Lines with error bands over a grid; a dot carries its value as a tooltip; `named` adds the lines' names."""
    axes = _axes(x_label, y_label)
    for s in series:
        points = [p for p in zip(s.x, s.y, s.low or s.y, s.high or s.y, strict=True) if all(map(math.isfinite, p))]
        if not points:
            continue
        x, y, low, high = zip(*points, strict=True)
        color = LIGHT.get(s.color, s.color)
        if s.low and s.line:
            axes.fill([*x, *x[::-1]], [*high, *low[::-1]], color=color, alpha=0.14, linewidth=0)
        if s.line:
            axes.plot(x, y, s.dash, color=color, linewidth=2.2, solid_joinstyle="round", label=s.name)
        for at, value in zip(x, y, strict=True) if s.dots else ():
            _dot(axes, at, value, color, f"{s.name}: {format_number(value)} at {format_number(at)}")
    if not axes.has_data():
        return empty_chart(title)
    axes.margins(x=0.01, y=0.06)
    _scale(axes, log_x, log_y)
    if named:
        axes.legend(frameon=False, fontsize=11)
    return _picture(axes, title)


@matplotlib.rc_context(STYLE)
def interval_chart(groups: Sequence[str], series: Sequence[Series], *, title: str, y_label: str) -> str:
    """Scores between 0 and 1 with whiskers: one column a group, one dot a series; `x` holds group numbers."""
    if not groups or not series:
        return empty_chart(title)
    axes = _axes("", y_label)
    column = (WIDTH - LEFT - RIGHT) / len(groups)
    step = min(34.0, 0.8 * column / len(series)) / column
    for index, s in enumerate(series):
        color = LIGHT.get(s.color, s.color)
        for place, y, low, high in zip(s.x, s.y, s.low or s.y, s.high or s.y, strict=True):
            x = place + (index - (len(series) - 1) / 2) * step
            axes.plot([x, x], [low, high], color=color, linewidth=2, alpha=0.55)
            _dot(axes, x, y, color, f"{s.name}: {y:.1%}, 95% interval {low:.1%} to {high:.1%}", size=11)
    names = ["\n".join(wrap(group, max(8, int(column / 7)))[:2]) for group in groups]
    axes.set(xlim=(-0.5, len(groups) - 0.5), ylim=(0, 1), yticks=[0, 0.25, 0.5, 0.75, 1])
    axes.set_xticks(range(len(groups)), names)
    axes.xaxis.grid(visible=False)
    for edge in range(1, len(groups)):
        axes.axvline(edge - 0.5, color=LIGHT["var(--line)"], linewidth=1, zorder=0.5)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return _picture(axes, title)


@matplotlib.rc_context(STYLE)
def point_chart(
    points: Sequence[Point], *, title: str, x_label: str, y_label: str, y_range: tuple[float, float] | None = None
) -> str:
    """One dot a point over a logarithmic x axis, joined by a thin line to its name.

    Names stand in one column in the order of their dots, so that they never overlap, however close the dots are.
    """
    points = [p for p in points if math.isfinite(p.x) and math.isfinite(p.y)]
    if not points:
        return empty_chart(title)
    right = WIDTH - NAMES
    axes = _axes(x_label, y_label, right)
    for p in points:
        color, interval = LIGHT.get(p.color, p.color), ""
        if math.isfinite(p.low) and math.isfinite(p.high):
            axes.plot([p.x, p.x], [p.low, p.high], color=color, linewidth=1.6, alpha=0.4)
            interval = f", 95% interval {p.low:.3g} to {p.high:.3g}"
        _dot(axes, p.x, p.y, color, f"{p.name}: {p.y:.3g} at {format_number(round(p.x))} keys{interval}", size=8.4)
    axes.set_ylim(y_range)
    axes.margins(y=0.05)
    _scale(axes, log_x=True, log_y=False)
    axes.set_xlim(min(p.x for p in points) / 1.12, max(p.x for p in points) * 1.12)
    low, high = axes.get_ylim()
    pad = 0.05 * (high - low) if y_range else 0.0
    axes.set_ylim(low - pad, high + pad)
    points = sorted(points, key=lambda p: (-p.y, -p.x))  # of equal height the nearest first: lines do not cross
    plot = axes.transAxes.inverted()
    dots = [plot.transform(axes.transData.transform((p.x, p.y))) for p in points]
    room = HEIGHT - BOTTOM - TOP
    for p, (x, y), place in zip(points, dots, _spread([room * (1 - y) for _, y in dots], room), strict=True):
        at, color = 1 - place / room, LIGHT.get(p.color, p.color)
        axes.plot([x, 1 + 8 / (right - LEFT)], [y, at], color=color, linewidth=0.8, alpha=0.45,
                  transform=axes.transAxes, scalex=False, scaley=False)  # fmt: skip
        axes.text(1 + 12 / (right - LEFT), at, p.name, color=color, va="center", size=12, transform=axes.transAxes)
    return _picture(axes, title)


@matplotlib.rc_context(STYLE)
def empty_chart(title: str) -> str:
    axes = _axes("", "")
    axes.set_axis_off()
    axes.text(0.5, 0.5, "no data", ha="center", transform=axes.transAxes)
    return _picture(axes, title)


def as_file(charts: Sequence[tuple[str, str]], columns: int = 2) -> str:
    """Charts with their headings as one SVG file with the page's colours, light or dark as its reader's page is."""
    style = CSS[: CSS.index("* {")] + "\n".join(re.findall(r"^svg (?:\.[^\n]*|text [^\n]*)$", CSS, re.MULTILINE))
    columns = max(1, min(columns, len(charts)))
    width, height = columns * (WIDTH + 30), -(-len(charts) // columns) * (HEIGHT + 44)
    parts = [f'<rect width="{width}" height="{height}" style="fill:var(--card)"/>']
    for place, (heading, chart) in enumerate(charts):
        x, y = 15 + place % columns * (WIDTH + 30), place // columns * (HEIGHT + 44)
        parts.append(f'<text x="{x + LEFT}" y="{y + 26}" class="heading">{escape(heading)}</text>')
        parts.append(chart.replace("<svg ", f'<svg x="{x}" y="{y + 36}" width="{WIDTH}" height="{HEIGHT}" ', 1))
    font = 'svg { font-family: system-ui, -apple-system, "Segoe UI", sans-serif; }\n'
    font += "svg .heading { font-size: 15px; font-weight: 650; fill: var(--ink); }\n"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">\n'
        f"<style>\n{style}\n{font}</style>\n" + "\n".join(parts) + "\n</svg>\n"
    )


def _axes(x_label: str, y_label: str, right: float = WIDTH - RIGHT) -> Axes:
    """A plot with a grid and nothing else around it, which ends at `right`."""
    figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72))
    figure.patch.set_visible(False)
    box = (LEFT / WIDTH, BOTTOM / HEIGHT, (right - LEFT) / WIDTH, (HEIGHT - TOP - BOTTOM) / HEIGHT)
    axes = figure.add_axes(box, frameon=False)
    axes.grid(color=LIGHT["var(--line)"], linewidth=1)
    axes.tick_params(length=0, pad=7, labelsize=12)
    axes.set_axisbelow(True)
    axes.set_xlabel(x_label, gid="label", size=12.5)
    axes.set_ylabel(y_label, gid="label", size=12.5)
    axes.yaxis.set_label_coords(13 / WIDTH, (1 + (BOTTOM - TOP) / HEIGHT) / 2, transform=figure.transFigure)
    return axes


def _dot(axes: Axes, x: float, y: float, color: str, tip: str, size: float = 7.2) -> None:
    axes.plot([x], [y], "o", color=color, markersize=size, markeredgewidth=0, gid=f"tip:{tip}", zorder=3)


def _scale(axes: Axes, log_x: bool, log_y: bool) -> None:
    """About six round ticks, powers of two where the axis is logarithmic."""
    for axis, log, make in ((axes.xaxis, log_x, axes.set_xscale), (axes.yaxis, log_y, axes.set_yscale)):
        if log:
            make("log", base=2)
        axis.set_major_locator(LogLocator(base=2, numticks=8) if log else MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: format_number(round(value, 12))))


def _spread(wanted: Sequence[float], room: float) -> list[float]:
    """Ascending heights as close to the wanted ones as NAME_HEIGHT between neighbours allows."""
    step = min(NAME_HEIGHT, room / max(1, len(wanted) - 1))
    places: list[float] = []
    for height in wanted:
        places.append(max(height, places[-1] + step) if places else height)
    limit = room
    for i in reversed(range(len(places))):
        places[i] = min(places[i], limit)
        limit = places[i] - step
    return places


def _picture(axes: Axes, title: str) -> str:
    """The chart for a page: no ids, no references, no fonts, named for screen readers."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the page's font draws it
        figure = cast(Figure, axes.figure)
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    root = ElementTree.fromstring(buffer.getvalue())
    radii = {str(path.get("id")): str(path.get("d")).split()[2] for path in root.iterfind(f".//{SVG}defs/{SVG}path")}
    name = escape(title)
    body = "".join(_drawn(node, radii, "tick") for node in root)
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}"><title>{name}</title>'
        f"{body}</svg>"
    )


def _drawn(node: ElementTree.Element, radii: dict[str, str], css: str) -> str:
    """What the backend wrote, group by group; dots, which it draws by reference, as circles."""
    kind, name = node.tag.removeprefix(SVG), node.get("id", "")
    if kind == "g":
        inner = "".join(_drawn(child, radii, "label" if name == "label" else css) for child in node)
        return f"<g><title>{escape(name[4:])}</title>{inner}</g>" if name.startswith("tip:") else inner
    written = re.findall(r"([\w-]+): ([^;]+)", node.get("style", ""))
    style = {key: LIGHT_NAMES.get(value, value) for key, value in written}
    places = {key: _rounded(node.get(key, "")) for key in ("x", "y", "d", "transform")}
    if kind == "use":
        radius = _rounded(radii[node.get("{http://www.w3.org/1999/xlink}href", "")[1:]])
        return f'<circle class="dot" cx="{places["x"]}" cy="{places["y"]}" r="{radius}" fill="{style["fill"]}"/>'
    if kind == "path":
        kept = ("fill", "stroke", "stroke-width", "stroke-dasharray", "stroke-linejoin", "opacity", "stroke-opacity")
        drawn = "; ".join(f"{key}: {_rounded(style[key])}" for key in kept if key in style)
        return f'<path d="{places["d"]}" style="{drawn}"/>'
    if kind == "text":
        turned = "" if "rotate(-0 " in places["transform"] else f' transform="{places["transform"]}"'
        at = "" if turned and not places["x"] else f' x="{places["x"]}" y="{places["y"]}"'
        color = f' style="fill: {style["fill"]}"' if "fill" in style else ""
        anchor = style.get("text-anchor", "start")
        return f'<text class="{css}"{at} text-anchor="{anchor}"{turned}{color}>{escape(node.text or "")}</text>'
    return ""


def _rounded(numbers: str) -> str:
    return " ".join(
        re.sub(r"\d+\.\d+", lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), numbers).split()
    )


LIGHT_NAMES = {value: name for name, value in reversed(LIGHT.items())}
