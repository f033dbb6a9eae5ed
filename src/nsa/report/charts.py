"""Charts as SVG through matplotlib: letters stay text, colours are the page's CSS variables, light or dark.

A chart is markup with a viewBox and no fixed size, so that the page lays it out. Colours are given as CSS, of which
`var(--nsa)` and the other variables of page.css are drawn in their light value and put back into the picture.
"""

import io
import math
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from textwrap import wrap
from typing import Any, Literal, cast
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from nsa.report.table import format_number

WIDTH, HEIGHT = 520, 330  # of the viewBox
LEFT, RIGHT, TOP, BOTTOM = 64, 14, 14, 46
NAMES = 104  # at the right edge, for the names of dots
NAME_HEIGHT = 15.0
STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "nsa", "text.parse_math": False}
CSS = files("nsa.report").joinpath("page.css").read_text(encoding="utf-8")
CSS_OF_CHARTS = CSS[: CSS.index("* {")]
LIGHT = {f"var(--{name})": value for name, value in re.findall(r"--([\w-]+): (#\w{6});", CSS[: CSS.index("}")])}
LIGHT_NAMES = {value: name for name, value in reversed(LIGHT.items())}
SVG = "{http://www.w3.org/2000/svg}"

Charts = list[tuple[str, Markup]]  # with their headings


@dataclass(frozen=True, kw_only=True)
class Series:
    """A line, with its values as dots or without; or dots alone. What is not finite is left out.

    low, high: the line's error band, or the 95% intervals of dots alone, NaN where there is none.
    """

    name: str
    color: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    line: bool = True
    dots: bool = False
    dash: str = "-"

    def points(self) -> list[tuple[float, ...]]:
        """(x, y, low, high) of what is drawn."""
        points = zip(self.x, self.y, self.low or self.y, self.high or self.y, strict=True)
        return [point for point in points if all(map(math.isfinite, point if self.line else point[:2]))]


def colors_of(attentions: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Of (name, attention): the first of NSA, dense and window has its own colour, others take the rest in turn."""
    colors: dict[str, str] = {}
    others = 0
    for name, attention in attentions:
        color = f"var(--{attention})" if attention in ("nsa", "dense", "window") else ""
        if not color or color in colors.values():
            color, others = f"var(--other-{others % 8})", others + 1
        colors[name] = color
    return colors


@matplotlib.rc_context(STYLE)
def draw(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str = "",
    y_label: str = "",
    log: Literal["", "x", "xy"] = "",
    columns: Sequence[str] = (),
    shares: bool = False,
    names: Literal["", "legend", "beside"] = "",
) -> Markup:
    """Series over a grid; a dot carries its value as a tooltip.

    Args:
        log: the axes that are logarithmic.
        columns: names of the places 0, 1, .. of x, in which series stand side by side.
        shares: y goes from 0 to 1, in percent.
        names: none; a legend; or beside the dots of series of one dot, joined to them by a thin line, in one column in
            the order of the dots, so that they never overlap.
    """
    axes = _axes(x_label, y_label, WIDTH - (NAMES if names == "beside" else RIGHT))
    said: Callable[[float], str] = "{:.1%}".format if shares else format_number
    width = (WIDTH - LEFT - RIGHT) / max(1, len(columns))
    apart = min(34.0, 0.8 * width / max(1, len(series))) / width if columns else 0.0
    for number, s in enumerate(series):
        points, color = s.points(), LIGHT.get(s.color, s.color)
        if points and s.line:
            xs, ys, lows, highs = zip(*points, strict=True)
            if s.low:
                axes.fill([*xs, *xs[::-1]], [*highs, *lows[::-1]], color=color, alpha=0.14, linewidth=0)
            axes.plot(xs, ys, s.dash, color=color, linewidth=2.2, solid_joinstyle="round", label=s.name)
        for at, value, low, high in points if s.dots or not s.line else ():
            tip = f"{s.name}: {said(value)}" + ("" if columns else f" at {format_number(at)}")
            at += (number - (len(series) - 1) / 2) * apart
            if s.low and not s.line and math.isfinite(low) and math.isfinite(high):
                axes.plot([at, at], [low, high], color=color, linewidth=1.8, alpha=0.5)
                tip += f", 95% interval {said(low)} to {said(high)}"
            size = 7.2 if s.line else 9.6
            axes.plot([at], [value], "o", color=color, markersize=size, markeredgewidth=0, gid=f"tip:{tip}", zorder=3)
    if not axes.has_data():
        axes.set_axis_off()
        axes.text(0.5, 0.5, "no data", ha="center", transform=axes.transAxes)
        return _picture(axes, title)
    axes.margins(x=0.06 if names == "beside" else 0.01, y=0.06)
    _scale(axes, log)
    if columns:
        axes.set_xlim(-0.5, len(columns) - 0.5)
        axes.set_xticks(range(len(columns)), ["\n".join(wrap(name, max(8, int(width / 7)))[:3]) for name in columns])
        axes.xaxis.grid(visible=False)
        for edge in range(1, len(columns)):
            axes.axvline(edge - 0.5, color=LIGHT["var(--line)"], linewidth=1, zorder=0.5)
    if shares:
        axes.set(ylim=(0, 1), yticks=[0, 0.25, 0.5, 0.75, 1])
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    if names == "legend":
        axes.legend(frameon=False, fontsize=11)
    elif names == "beside":
        _name_beside(axes, series)
    return _picture(axes, title)


def as_file(charts: Charts, columns: int = 2) -> str:
    """Charts with their headings as one SVG file with the page's colours, light or dark as its reader's page is."""
    columns = max(1, min(columns, len(charts)))
    width, height = columns * (WIDTH + 30), -(-len(charts) // columns) * (HEIGHT + 44)
    parts = []
    for place, (heading, chart) in enumerate(charts):
        x, y = 15 + place % columns * (WIDTH + 30), place // columns * (HEIGHT + 44)
        parts.append(f'<text x="{x + LEFT}" y="{y + 26}" class="heading">{escape(heading)}</text>')
        parts.append(str(chart).replace("<svg ", f'<svg x="{x}" y="{y + 36}" width="{WIDTH}" height="{HEIGHT}" ', 1))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">\n'
        f'<style>\n{CSS_OF_CHARTS}</style>\n<rect width="{width}" height="{height}" style="fill:var(--card)"/>\n'
        + "\n".join(parts) + "\n</svg>\n"
    )  # fmt: skip


def _axes(x_label: str, y_label: str, right: float) -> Axes:
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


def _scale(axes: Axes, log: str) -> None:
    """About six round ticks, powers of two where the axis is logarithmic and several of them are in sight."""
    for name, axis, scale in (("x", axes.xaxis, axes.set_xscale), ("y", axes.yaxis, axes.set_yscale)):
        if name in log:
            scale("log", base=2)
        low, high = axes.get_xlim() if name == "x" else axes.get_ylim()
        powers = name in log and high > 4 * low
        axis.set_major_locator(LogLocator(base=2, numticks=8) if powers else MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: format_number(round(value, 12))))


def _name_beside(axes: Axes, series: Sequence[Series]) -> None:
    plot, room, width = axes.transAxes.inverted(), HEIGHT - BOTTOM - TOP, WIDTH - NAMES - LEFT
    ends = [(s, *plot.transform(axes.transData.transform(s.points()[-1][:2]))) for s in series if s.points()]
    ends.sort(key=lambda end: (-end[2], -end[1]))  # of equal height the nearest first: lines do not cross
    places = _spread([room * (1 - y) for _, _, y in ends], room)
    fixed: Any = {"transform": axes.transAxes}
    axes.autoscale(False)
    for (s, x, y), place in zip(ends, places, strict=True):
        at, color = 1 - place / room, LIGHT.get(s.color, s.color)
        axes.plot([x, 1 + 8 / width], [y, at], color=color, linewidth=0.8, alpha=0.45, **fixed)
        axes.text(1 + 12 / width, at, s.name, color=color, va="center", size=12, **fixed)


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


def _picture(axes: Axes, title: str) -> Markup:
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
    box = f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}"'
    return Markup(f'<svg class="chart" {box}><title>{name}</title>{body}</svg>')


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
        drawn = "; ".join(f"{key}: {_rounded(value)}" for key, value in style.items())
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
