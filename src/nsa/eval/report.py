"""A result as one HTML file that needs nothing else: no network, no scripts, no fonts, no images beside it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from nsa.eval import sections
from nsa.eval.costs import Costs
from nsa.eval.method_sections import quality_and_costs
from nsa.eval.models import Candidate
from nsa.eval.pictures import BlockPicture, Curve, KeysRead, continuation, look_inside, picture_prompt, read_curve
from nsa.eval.result import Result


@dataclass(kw_only=True)
class Report:
    """Everything on the page. Only `result` is needed; a section without data is left out.

    `tiles` are (number, meaning) pairs shown large at the top; `samples` maps a model to (prompt, continuation).
    """

    result: Result
    title: str = "Long context, judged"
    lead: str = ""
    tiles: Sequence[tuple[str, str]] = ()
    curves: dict[str, Curve] = field(default_factory=dict)
    picture: BlockPicture | None = None
    keys: KeysRead | None = None
    samples: dict[str, tuple[str, str]] = field(default_factory=dict)
    costs: Costs | None = None

    @classmethod
    def of(cls, candidates: Sequence[Candidate], result: Result, *, text: str, **more: Any) -> "Report":
        """Fill in what can be read from the models: curves of training, selected blocks, keys read, samples."""
        prompt = picture_prompt(candidates, result)
        inside = next(filter(None, (look_inside(c, prompt) for c in candidates)), None) if prompt else None
        picture, keys = inside or (None, None)
        return cls(
            result=result,
            curves={c.name: read_curve(c.folder) for c in candidates},
            picture=picture,
            keys=keys,
            samples={c.name: continuation(c, text) for c in candidates},
            **more,
        )

    def render(self) -> str:
        """The page, from the most important to the most detailed."""
        colors = sections.colors_of(self.result)
        body = [
            quality_and_costs(self.result, self.costs, colors),
            sections.table(self.result, colors),
            sections.long_context(self.result, colors),
            sections.needles(self.result),
            sections.curves(self.curves, colors),
            sections.blocks(self.picture),
            sections.keys_read(self.keys),
            sections.samples(self.samples, colors),
            sections.what_was_run(self.result),
        ]
        style = files("nsa.eval").joinpath("report.css").read_text(encoding="utf-8")
        tiles = "".join(f'<div class="tile"><b>{escape(n)}</b><span>{escape(t)}</span></div>' for n, t in self.tiles)
        tiles = f'<div class="tiles">{tiles}</div>' if tiles else ""
        lead = f'<p class="lead">{escape(self.lead)}</p>' if self.lead else ""
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self.title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
            f'<header><p class="kicker">Native Sparse Attention</p><h1>{escape(self.title)}</h1>{lead}</header>\n'
            f"{tiles}\n" + "\n".join(part for part in body if part) + "\n"
            "<footer>One file, no scripts, nothing loaded from elsewhere: keep it, send it, open it.</footer>\n"
            "</main>\n</body>\n</html>\n"
        )

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(self.render(), encoding="utf-8")
        partial.replace(path)
