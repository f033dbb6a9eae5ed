"""Points with whiskers, each named at the right edge: quality against keys read, as inline SVG and as a file."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files

from nsa.eval.svg import BOTTOM, HEIGHT, LEFT, TOP, WIDTH, empty_chart, format_number, frame, scale, svg

NAMES = 104  # pixels at the right edge for the points' names
NAME_HEIGHT = 15.0


@dataclass(frozen=True, kw_only=True)
class Point:
    """A dot with its 95% interval; NaN bounds for none."""

    name: str
    color: str
    x: float
    y: float
    low: float = math.nan
    high: float = math.nan


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
    xs, ys = [p.x for p in points], [y for p in points for y in (p.y, p.low, p.high) if math.isfinite(y)]
    x_axis = scale(min(xs) / 1.12, max(xs) * 1.12, LEFT, right, log=True)
    low, high = y_range or (min(ys), max(ys))
    pad = 0.05 * ((high - low) or abs(high) or 1.0)
    y_axis = scale(low - pad, high + pad, HEIGHT - BOTTOM, TOP)
    parts = [frame(x_axis, y_axis, x_label, y_label, right=right)]
    for p in points:
        if math.isfinite(p.low) and math.isfinite(p.high):
            middle, bottom, top = x_axis(p.x), y_axis(p.low), y_axis(p.high)
            parts.append(
                f'<line x1="{middle:.1f}" x2="{middle:.1f}" y1="{bottom:.1f}" y2="{top:.1f}" stroke="{p.color}" '
                f'stroke-width="1.6" opacity=".4"/>'
            )
    points = sorted(points, key=lambda p: (-p.y, -p.x))  # of equal height the nearest first: lines do not cross
    for p, place in zip(points, _spread([y_axis(p.y) for p in points]), strict=True):
        x, y = x_axis(p.x), y_axis(p.y)
        interval = f", 95% interval {p.low:.3g} to {p.high:.3g}" if math.isfinite(p.low) else ""
        parts.append(
            f'<path class="lead" d="M{x:.1f} {y:.1f}L{right + 8} {place:.1f}" fill="none" stroke="{p.color}" '
            f'stroke-width=".8" opacity=".45"/>'
            f'<text class="tick" x="{right + 12}" y="{place + 4:.1f}" style="fill:{p.color}">{escape(p.name)}</text>'
            f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="4.2" fill="{p.color}">'
            f"<title>{escape(p.name)}: {p.y:.3g} at {format_number(round(p.x))} keys{interval}</title></circle>"
        )
    return svg(parts, title)


def as_file(charts: Sequence[tuple[str, str]], columns: int = 2) -> str:
    """Charts with their headings as one SVG file with the report's colours, light or dark as its reader's page is."""
    css = files("nsa.eval").joinpath("report.css").read_text(encoding="utf-8")
    style = css[: css.index("* {")] + "\n".join(re.findall(r"^svg (?:\.[^\n]*|text [^\n]*)$", css, re.MULTILINE))
    rows = -(-len(charts) // columns)
    width, height = columns * (WIDTH + 30), rows * (HEIGHT + 44)
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


def _spread(wanted: Sequence[float]) -> list[float]:
    """Ascending heights as close to the wanted ones as NAME_HEIGHT between neighbours allows."""
    step = min(NAME_HEIGHT, (HEIGHT - BOTTOM - TOP) / max(1, len(wanted) - 1))
    places: list[float] = []
    for height in wanted:
        places.append(max(height, places[-1] + step) if places else height)
    limit = float(HEIGHT - BOTTOM)
    for i in reversed(range(len(places))):
        places[i] = min(places[i], limit)
        limit = places[i] - step
    return places
