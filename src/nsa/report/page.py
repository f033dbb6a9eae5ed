"""The report's page: one template, filled with plain values; whatever is filled in is escaped."""

import re
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from nsa.report.charts import CSS


def render(**values: Any) -> str:
    """page.html; a section whose value is empty is left out, and a value that the page needs may not be missing."""
    return part("page", **values)


def part(macro: str, *arguments: Any, **values: Any) -> str:
    """One of the page's macros by itself."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters["typeset"] = typeset
    environment.filters["sentence"] = sentence
    template = environment.from_string(files("nsa.report").joinpath("page.html").read_text(encoding="utf-8"))
    module = template.make_module({"css": Markup(CSS), **values})
    return str(getattr(module, macro)(*arguments)).lstrip()


def typeset(detail: str) -> str:
    """Ranges and minus signs as in print, and where a narrow column may not break them."""
    ranges = re.sub(r"(?<=\d)-(?=\d)", "\u2060\u2013\u2060", detail)
    return ranges.replace("-", "\u2212").replace("± ", "±\u00a0")


def sentence(title: str) -> str:
    """A table's title as the page's headings are."""
    return title[:1].upper() + title[1:]
