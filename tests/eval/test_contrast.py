"""Text of the report and its charts can be read: WCAG 2's contrast of 4.5, on light pages and on dark ones."""

import re
from importlib.resources import files

import pytest

from nsa.eval.report_pictures import color_of, ink_on

CSS = files("nsa.report").joinpath("page.css").read_text(encoding="utf-8")
LIGHT, DARK = (
    dict(re.findall(r"--([\w-]+): ([^;]+);", scheme)) for scheme in re.findall(r":root \{(.*?)\}", CSS, re.S)
)
DARK = {**LIGHT, **DARK}
LEAST = 4.5

COLORS = ("nsa", "dense", "window", *(f"other-{i}" for i in range(8)))
# What is written in which colour on which ground: the rules of page.css, and the names beside the points of a chart.
PAIRS = [(text, ground) for text in ("ink", "soft", "faint", "nsa") for ground in ("bg", "card")]
PAIRS += [("ink", "code"), ("faint", "code"), ("ink", "mark"), ("needle", "card")]
PAIRS += [(color, "card") for color in COLORS]


def rgb(color: str) -> tuple[float, ...]:
    assert re.fullmatch(r"#[0-9a-f]{6}", color), color
    return tuple(int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))


def luminance(color: tuple[float, ...]) -> float:
    """WCAG 2.2's relative luminance of sRGB."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color]
    return sum(share * c for share, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_the_standards():
    assert contrast(rgb("#000000"), rgb("#ffffff")) == pytest.approx(21.0)
    assert contrast(rgb("#767676"), rgb("#ffffff")) == pytest.approx(4.54, abs=0.005)  # WCAG's own example


@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize(("text", "ground"), PAIRS, ids="-".join)
def test_text_can_be_read(scheme, text, ground):
    assert contrast(rgb(scheme[text]), rgb(scheme[ground])) >= LEAST


@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
def test_text_can_be_read_in_every_shade_of_the_blocks_that_were_chosen(scheme):
    shade = tuple(int(part) / 255 for part in scheme["nsa-rgb"].split(","))
    assert shade == pytest.approx(rgb(scheme["nsa"]))
    for opacity in (0.08, 0.28, 0.48):  # of marked_text: none to all of the layers and groups
        ground = tuple(opacity * a + (1 - opacity) * b for a, b in zip(shade, rgb(scheme["code"]), strict=True))
        assert contrast(rgb(scheme["ink"]), ground) >= LEAST


def test_shares_can_be_read_in_every_cell_of_a_heat_map():
    inks = {"dark": "#000000", "light": "#ffffff"}
    assert ".heat .dark { color: #000000; }" in CSS
    assert ".heat .light { color: #ffffff; }" in CSS
    shares = [i / 100 for i in range(101)]
    assert min(contrast(rgb(inks[ink_on(share)]), rgb(color_of(share))) for share in shares) >= LEAST


def test_every_color_of_text_is_among_the_pairs():
    named = set(re.findall(r"(?:[; {](?:color|fill)): ?var\(--([\w-]+)\)", CSS))
    assert named - {"line"} <= {text for text, _ in PAIRS}  # `line` fills the strips that hold no text
