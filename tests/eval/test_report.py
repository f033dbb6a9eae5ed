"""The report: every section, well-formed, nothing loaded from elsewhere; results survive their file."""

import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from nsa.config import InfLLMv2Config, NSAConfig
from nsa.eval.pictures import BlockPicture, Curve, Head, KeysRead
from nsa.eval.report import Report
from nsa.eval.report_pictures import color_of, heat_map, marked_text
from nsa.eval.result import Result, paired_difference
from nsa.eval.table import blocks_of, own_and_shared
from nsa.eval.tasks import Row
from nsa.report.charts import HEIGHT, NAME_HEIGHT, Series, as_file, draw
from nsa.report.page import part
from nsa.report.table import format_number

VOID = {"meta", "br"}


class Page(HTMLParser):
    """Checks that tags close in order; collects ids, tags, attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def example_result() -> Result:
    rows = {}
    for name, right in (("nsa", 3), ("dense", 4), ("window", 0)):
        rows[name] = [
            Row.of_answers("needle", {"length": length, "depth": depth}, [i < right for i in range(4)], 0.01)
            for length in (64, 128)
            for depth in (0.0, 1.0)
        ]
        where = {"length": 128, "region": "beyond the window"}
        rows[name].append(Row.of_answers("recall", where, [i < right for i in range(4)], 0.01))
        for positions in ("all", [1, 64], [64, 128]):
            losses = [2.0 - 0.1 * right + 0.3 * i for i in range(4)]
            rows[name].append(Row.of_losses("perplexity", {"length": 128, "positions": positions}, losses))
    models = [
        {"name": name, "folder": f"runs/{name}", "attention": name, "num_parameters": 1000, "num_layers": 2,
         "max_positions": 128, "vocab_size": 256, "nsa": NSAConfig(window_size=32).to_dict()}
        for name in rows
    ]  # fmt: skip
    run = {"command": "nsa eval <runs>", "date": "2026-01-01", "versions": {"torch": "2"},
           "hardware": {"processor": "p", "threads": 1, "device": "CPU only", "system": "Linux"}}  # fmt: skip
    tasks = {"needle": {"lengths": [64, 128], "samples": 4}, "recall": {"length": 128}, "perplexity": {"length": 128}}
    return Result(models=models, tasks=tasks, rows=rows, run=run, notes=["a note & <more>"])


def example_report() -> Report:
    head = Head(name="layer 1", scores=[0.1, 0.9, 0.2, 0.3], selected=[0, 1, 3], forced=[0, 3])
    picture = BlockPicture(model="nsa", pieces=list("<text & needle in it>" + "." * 43), needle=(9, 17), answer="x<y",
                           window_size=8, block_size=16, heads=[head])  # fmt: skip
    keys = KeysRead(model="nsa", config=NSAConfig(), contexts=[32, 64], counted=[30.0, 50.0])
    curve = Curve(losses={"loss": {1: 3.0, 2: math.nan}, "eval_text_loss": {2: 2.5}})
    return Report(
        result=example_result(),
        title="A title",
        lead="A lead",
        tiles=[("97%", "of all")],
        curves={"nsa": curve},
        picture=picture,
        keys=keys,
        samples={"nsa": ("def f(", "x): return x < 1")},
    )


def test_the_page_has_every_section_and_closes_every_tag():
    page = Page(example_report().render())
    assert page.ids == ["results", "context", "needle", "curves", "blocks", "keys", "sample", "run"]
    for words in ("A title", "A lead", "97%", "x): return x < 1", "nsa eval <runs>", "a note & <more>", "x<y"):
        assert words in page.text


def test_the_keys_of_the_page_are_those_of_the_models_method_and_of_its_dense_layers():
    sizes = InfLLMv2Config(kernel_size=4, kernel_stride=4, block_size=8, window_size=16, topk=3, dense_len=0)
    keys = KeysRead(model="m", config=sizes, contexts=[32, 64], counted=[32.0, 56.0], sparse=3, dense=(10**9,))
    page = Page(replace(example_report(), keys=keys).render())
    # 3 + 16 / 8 blocks of 8 tokens: 40 keys; of 32 tokens all, of 64 tokens 16 pooled keys more. One layer reads all.
    each = (32, 64), (32, (3 * (5 * 8 + 64 // 4) + 64) / 4)
    rows = (f"{s}{s}16{read:.1f}{counted}" for s, read, counted in zip(*each, keys.counted, strict=True))
    assert page.text.partition("contextdensewindowInfLLM-V2counted")[2].startswith("".join(rows))
    for words in ("n = 5, b = 8, d = 4; of up to 40 tokens it reads all", "1 of 4 layers are dense"):
        assert words in page.text
    assert "NSA reads" not in page.text


def test_names_are_escaped_everywhere():
    report = example_report()
    odd = '<img src=x onerror="run()">&'
    for model in report.result.models:
        model |= {"name": model["name"] + odd, "folder": odd, "attention": odd if model["name"] == "nsa" else "dense"}
    report.result.rows = {name + odd: rows for name, rows in report.result.rows.items()}
    report.curves, report.samples = {"nsa" + odd: report.curves["nsa"]}, {"nsa" + odd: (odd, odd)}
    report.picture, report.keys = replace(report.picture, model=odd, answer=odd), replace(report.keys, model=odd)
    report.title, report.lead, report.tiles = odd, odd, [(odd, odd)]
    report.result.run["command"] = report.result.run["versions"]["torch"] = report.result.run["date"] = odd
    html = report.render()
    assert "<img" not in html
    page = Page(html)
    assert not any(tag == "img" for tag, _, _ in page.attributes)
    assert page.text.count(odd) > 20


def test_the_page_loads_nothing():
    html = example_report().render()
    assert "://" not in html
    assert "@import" not in html
    assert "url(" not in html
    page = Page(html)
    assert not any(name in ("src", "href", "xlink:href") for _, name, _ in page.attributes)
    assert not any(tag in ("script", "link", "iframe", "img") for tag, _, _ in page.attributes)


def test_a_report_without_pictures_leaves_their_sections_out():
    page = Page(Report(result=example_result()).render())
    assert page.ids == ["results", "context", "needle", "run"]


def test_saving_leaves_one_file(tmp_path):
    example_report().save(tmp_path / "deep" / "report.html")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["report.html"]


def test_a_result_survives_its_file(tmp_path: Path):
    result = example_result()
    result.save(tmp_path / "eval.json")
    text = (tmp_path / "eval.json").read_text(encoding="utf-8")
    again = Result.from_json(text)
    assert again == result
    assert again.to_json() + "\n" == text
    assert [path.name for path in tmp_path.iterdir()] == ["eval.json"]


def test_nan_survives_as_nan():
    row = Row.of_losses("perplexity", {}, [math.nan, 1.0])
    result = Result(models=[], tasks={}, rows={"m": [row]})
    assert "NaN" not in result.to_json()
    again = Result.from_json(result.to_json()).rows["m"][0]
    assert math.isnan(again.value)
    assert math.isnan(again.values[0])
    assert again.values[1] == 1.0


def test_a_file_of_another_format_is_refused():
    with pytest.raises(ValueError, match="expected a result of format 1, got 99"):
        Result.from_json('{"format": 99}')
    with pytest.raises(ValueError, match=r"unknown fields \['colour'\]"):
        Row.from_dict({"colour": 1})


def test_differences_are_paired():
    """Two models that differ by 0.1 on every sequence differ without doubt, however different the sequences are."""
    one = Row.of_losses("perplexity", {"length": 8}, [1.0, 5.0, 9.0])
    two = Row.of_losses("perplexity", {"length": 8}, [0.9, 4.9, 8.9])
    difference, error = paired_difference(two, one)
    assert difference == pytest.approx(-0.1)
    assert error == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(ValueError, match="rows of different samples"):
        paired_difference(one, Row.of_losses("perplexity", {"length": 9}, [1.0, 2.0, 3.0]))


def test_the_dense_twin_is_the_reference():
    result = example_result()
    assert result.reference == "dense"
    result.models = [model for model in result.models if model["name"] != "dense"]
    assert result.reference == "nsa"
    result.models = result.models[:1]
    assert result.reference is None


def test_the_table_sums_needles_over_depths_and_sets_losses_beside_dense():
    needle, recall, perplexity = blocks_of(example_result())
    assert needle.title == "needle: all depths, chance 1.0%"
    assert [(line.where, line.cells[0]) for line in needle.lines] == [
        ("64 tokens", ("75.0%", "6/8 (41-93%)")),
        ("128 tokens", ("75.0%", "6/8 (41-93%)")),
    ]
    assert recall.lines[0].where == "128 tokens, beyond the window"
    nsa, dense, window = perplexity.lines[0].cells
    assert (nsa, window) == (("2.150", "+0.100 ± 0.000"), ("2.450", "+0.400 ± 0.000"))
    assert dense == ("2.050", "± 0.194")


def test_rows_are_told_apart_by_what_differs():
    places = [{"length": 64, "hops": 1, "keys": 4}, {"length": 64, "hops": 2, "keys": 4}]
    assert own_and_shared(places) == (["1 hop", "2 hops"], "64 tokens, 4 keys")


def test_the_heat_map_shows_every_cell_in_its_place():
    counts = {(64, 0.0): (1, 4), (64, 1.0): (4, 4), (128, 0.0): (0, 4), (128, 1.0): (2, 4)}
    html = part("heat_map", heat_map(counts, title="t"))
    assert [re.findall(r'title="([^"]*)">([^<]*)<', row) for row in html.split("</tr>")[:2]] == [
        [("64 tokens, needle at 0%: 1 of 4", "25%"), ("128 tokens, needle at 0%: 0 of 4", "0%")],
        [("64 tokens, needle at 100%: 4 of 4", "100%"), ("128 tokens, needle at 100%: 2 of 4", "50%")],
    ]
    assert re.findall(r"<th>([^<]*)</th>", html) == ["0%", "100%", "depth", "64", "128", ""]
    assert len({color_of(0.0), color_of(0.5), color_of(1.0)}) == 3


def text_page(*arguments, **more) -> Page:
    page = Page(part("marked_text", list(marked_text(*arguments, **more))))
    page.text = page.text.removesuffix("\n")  # after </pre>
    return page


def test_marked_text_is_the_text():
    pieces = list('if a < b: print("x")\n' * 20)
    page = text_page(pieces, [0, 1, 0, 3], top=4, needle=(30, 70), block_size=16, context=10_000)
    assert page.text == "".join(pieces)
    assert page.attributes.count(("mark", "class", "needle-text")) == 4  # of four blocks: 30-31, 32-47, 48-63, 64-69


def test_marked_text_leaves_out_what_nobody_selected():
    page = text_page(["x"] * 1600, [1] + [0] * 99, top=1, needle=(1590, 1595), block_size=16, context=32)
    assert page.text.count("x") == 16 * 3 + 16 * 3
    assert "… 1,504 tokens …" in page.text


def test_charts_take_losses_that_are_not_finite():
    assert "nan" not in draw([Series(name="a", color="red", x=[1, 2, 3], y=[1.0, math.nan, 2.0])], title="t")
    assert "no data" in draw([Series(name="a", color="red", x=[], y=[])], title="t")


def test_numbers_are_short():
    assert [format_number(x) for x in (0.0, 64, 1536, 8192, 65536, 0.123456, math.nan)] == [
        "0", "64", "1,536", "8k", "64k", "0.123", "–",
    ]  # fmt: skip


def dot(name: str, color: str, x: float, y: float, **interval) -> Series:
    return Series(name=name, color=color, x=[x], y=[y], line=False, **interval)


def test_names_of_points_never_overlap_and_stand_in_the_order_of_their_dots():
    dots = [dot(f"m{i}", "var(--nsa)", 100.0 + i, 0.5 + 0.001 * (i % 3), low=[0.4], high=[0.6]) for i in range(9)]
    chart = draw(dots, title="t", log="x", shares=True, names="beside")
    names = re.findall(r'<text class="tick" x="[\d.]+" y="([\d.]+)" [^>]*fill: var\(--nsa\)">m(\d)</text>', chart)
    heights = [float(y) for y, _ in names]
    assert len(names) == 9
    assert all(b - a >= NAME_HEIGHT - 0.1 for a, b in pairwise(heights))
    assert heights[0] > 0
    assert heights[-1] < HEIGHT
    assert [int(i) % 3 for _, i in names] == [2, 2, 2, 1, 1, 1, 0, 0, 0]
    assert "no data" in draw([dot("a", "red", 1.0, math.nan)], title="t", log="x", names="beside")
    without = draw([dot("a", "red", 1.0, 1.0, low=[math.nan], high=[math.nan])], title="t", log="x", names="beside")
    assert "nan" not in without


def test_charts_write_letters_as_text_and_colours_as_the_pages_variables():
    series = [Series(name="$a$ <b>", color="var(--nsa)", x=[1, 2], y=[1.0, 2.0], low=[0, 1], high=[2, 3], dots=True)]
    labels = {"title": "t", "x_label": "tokens & more", "y_label": "y"}
    chart = draw(series, **labels, log="x", names="legend")
    for said in (">tokens &amp; more</text>", ">$a$ &lt;b&gt;</text>", "<title>$a$ &lt;b&gt;: 2 at 2</title>"):
        assert said in chart
    assert not re.search(r"#[0-9a-fA-F]{3,6}|<defs|<use|url\(| id=|clip", chart)
    assert chart == draw(series, **labels, log="x", names="legend")


def test_charts_as_a_file_are_one_picture_that_needs_no_page():
    chart = draw([dot("a", "var(--dense)", 1.0, 1.0)], title="t", names="beside")
    root = ElementTree.fromstring(as_file([("one", chart), ("two & three", chart), ("four", chart)]))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    inner = root.findall("{http://www.w3.org/2000/svg}svg")
    assert len({(svg.get("x"), svg.get("y")) for svg in inner}) == 3
    style = root.find("{http://www.w3.org/2000/svg}style").text
    assert all(word in style for word in ("--dense:", ".dot", ".tick", "prefers-color-scheme: dark"))
