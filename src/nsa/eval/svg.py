"""Charts as inline SVG, written by hand: no plotting library, no pixels, and the page's own fonts and colours.

Every chart is a string with a viewBox and no fixed size, so that the page lays it out; colours are the page's
CSS variables (`--nsa`, `--dense`, `--window`, ...), so that a dark page has dark charts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 520, 330
LEFT, RIGHT, TOP, BOTTOM = 64, 14, 14, 46


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
    dash: str = ""


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic scale from values to the pixels of the plot, with round ticks."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    ticks: list[float] = field(default_factory=list)

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(max(v, 1e-12)) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / ((high - low) or 1.0) * (self.end - self.start)


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    y_range: tuple[float, float] | None = None,
) -> str:
    """Lines with error bands over a grid; every point carries its value as a tooltip if it has a dot."""
    series = [s for s in series if len(s.x)]
    xs = [x for s in series for x in s.x if math.isfinite(x)]
    ys = [y for s in series for y in (*s.y, *s.low, *s.high) if math.isfinite(y)]
    if not xs or not ys:
        return empty_chart(title)
    x_axis = scale(min(xs), max(xs), LEFT, WIDTH - RIGHT, log_x)
    low, high = y_range or _padded(min(ys), max(ys), log_y)
    y_axis = scale(low, high, HEIGHT - BOTTOM, TOP, log_y)
    parts = [frame(x_axis, y_axis, x_label, y_label)]
    for s in series:
        points = [(x, y) for x, y in zip(s.x, s.y, strict=True) if math.isfinite(y)]
        if s.low and s.line:
            upper = [(x, y) for x, y in zip(s.x, s.high, strict=True) if math.isfinite(y)]
            lower = [(x, y) for x, y in zip(s.x, s.low, strict=True) if math.isfinite(y)]
            parts.append(f'<path d="{_path(x_axis, y_axis, upper + lower[::-1])}Z" fill="{s.color}" opacity=".14"/>')
        if s.line:
            dash = f' stroke-dasharray="{s.dash}"' if s.dash else ""
            parts.append(
                f'<path d="{_path(x_axis, y_axis, points)}" fill="none" stroke="{s.color}" stroke-width="2.2" '
                f'stroke-linejoin="round" stroke-linecap="round"{dash}/>'
            )
        if s.dots:
            parts += [
                f'<circle class="dot" cx="{x_axis(x):.1f}" cy="{y_axis(y):.1f}" r="3.6" fill="{s.color}">'
                f"<title>{escape(s.name)}: {format_number(y)} at {format_number(x)}</title></circle>"
                for x, y in points
            ]
    return svg(parts, title)


def interval_chart(groups: Sequence[str], series: Sequence[Series], *, title: str, y_label: str) -> str:
    """Scores between 0 and 1 with whiskers: one column a group, one dot a series; `x` holds group numbers."""
    if not groups or not series:
        return empty_chart(title)
    y_axis = Axis(0, 1, HEIGHT - BOTTOM, TOP, ticks=[0, 0.25, 0.5, 0.75, 1])
    column = (WIDTH - LEFT - RIGHT) / len(groups)
    parts = [_y_grid(y_axis, y_label, percent=True)]
    for index, group in enumerate(groups):
        middle = LEFT + (index + 0.5) * column
        for row, line in enumerate(_wrap(group, max(8, int(column / 7)))):
            parts.append(_text(middle, HEIGHT - BOTTOM + 17 + 13 * row, line, "middle"))
        if index:
            edge = LEFT + index * column
            parts.append(f'<line class="grid" x1="{edge:.1f}" x2="{edge:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    step = min(34.0, 0.8 * column / len(series))
    for index, s in enumerate(series):
        shift = (index - (len(series) - 1) / 2) * step
        for i, (place, y) in enumerate(zip(s.x, s.y, strict=True)):
            x = LEFT + (place + 0.5) * column + shift
            low, high = (s.low[i], s.high[i]) if s.low else (y, y)
            parts.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y_axis(low):.1f}" y2="{y_axis(high):.1f}" '
                f'stroke="{s.color}" stroke-width="2" opacity=".55"/>'
                f'<circle cx="{x:.1f}" cy="{y_axis(y):.1f}" r="5.5" fill="{s.color}">'
                f"<title>{escape(s.name)}: {y:.1%}, 95% interval {low:.1%} to {high:.1%}</title></circle>"
            )
    return svg(parts, title)


def empty_chart(title: str) -> str:
    return svg([_text(WIDTH / 2, HEIGHT / 2, "no data", "middle")], title)


def format_number(value: float) -> str:
    """1536 -> 1,536; 8192 -> 8k; 0.123456 -> 0.123."""
    if not math.isfinite(value):
        return "–"
    if abs(value) >= 4096 and value % 1024 == 0:
        return f"{value / 1024:.0f}k"
    if abs(value) >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.3g}"


def frame(x_axis: Axis, y_axis: Axis, x_label: str, y_label: str, right: float = WIDTH - RIGHT) -> str:
    """Grid, ticks and labels of a plot that ends at `right`."""
    parts = [_y_grid(y_axis, y_label, right=right)]
    for tick in x_axis.ticks:
        x = x_axis(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(_text(x, HEIGHT - BOTTOM + 17, format_number(tick), "middle"))
    parts.append(_text((LEFT + right) / 2, HEIGHT - 8, x_label, "middle", "label"))
    return "".join(parts)


def _y_grid(y_axis: Axis, y_label: str, percent: bool = False, right: float = WIDTH - RIGHT) -> str:
    parts = []
    for tick in y_axis.ticks:
        y = y_axis(tick)
        name = f"{tick:.0%}" if percent else format_number(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(LEFT - 8, y + 4, name, "end"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text class="label" text-anchor="middle" transform="translate(13 {middle:.1f}) rotate(-90)">'
        f"{escape(y_label)}</text>"
    )
    return "".join(parts)


def scale(low: float, high: float, start: float, end: float, log: bool = False) -> Axis:
    """An axis with about six round ticks."""
    if log:
        low, high = max(low, 1e-12), max(high, 1e-12)
        first, last = math.log2(low), math.log2(high)
        every = max(1, math.ceil((last - first) / 6))
        ticks = [2.0**e for e in range(math.ceil(first - 1e-9), math.floor(last + 1e-9) + 1, every)]
        return Axis(low, high, start, end, True, ticks)
    span = (high - low) or 1.0
    raw = span / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw - 1e-12 * power)
    first_tick = math.ceil(low / step - 1e-9)
    last_tick = math.floor(high / step + 1e-9)
    return Axis(low, high, start, end, False, [round(i * step, 12) for i in range(first_tick, last_tick + 1)])


def _padded(low: float, high: float, log: bool) -> tuple[float, float]:
    if log:
        return low / 1.15, high * 1.15
    pad = 0.06 * ((high - low) or abs(high) or 1.0)
    return low - pad, high + pad


def _path(x_axis: Axis, y_axis: Axis, points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x_axis(x):.1f} {y_axis(y):.1f}" for x, y in points)


def _text(x: float, y: float, text: str, anchor: str, css: str = "tick") -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _wrap(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines[:2]


def svg(parts: Sequence[str], title: str, width: float = WIDTH, height: float = HEIGHT) -> str:
    """The whole picture, named for screen readers."""
    return (
        f'<svg class="chart" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )
