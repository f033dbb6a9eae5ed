"""A result as one HTML file that needs nothing else: no network, no scripts, no fonts, no images beside it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nsa.config import InfLLMv2Config
from nsa.eval.compare_table import tables_of
from nsa.eval.costs import Costs
from nsa.eval.models import Candidate
from nsa.eval.pictures import BlockPicture, Curve, KeysRead, continuation, look_inside, picture_prompt, read_curve
from nsa.eval.report_charts import colors_of, context_charts, curve_charts, keys_chart, keys_legend, quality_charts
from nsa.eval.report_pictures import needle_maps, selected_blocks
from nsa.eval.result import Result
from nsa.eval.table import Block, blocks_of
from nsa.files import write_whole
from nsa.methods.registry import TRAINED
from nsa.report.page import render


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
    compared: Result | None = None  # what the costs are of, where that is another result
    recipes: Any = None  # nsa.eval.recipes_report.Recipes
    blocks: list[Block] | None = None  # by default those of the result
    seeds: Mapping[str, int] = field(default_factory=dict)  # behind a model's numbers, where that is more than one
    colors: Mapping[str, str] | None = None
    origins: Sequence[tuple[str, Result]] = ()  # of the numbers, with titles; by default the result

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
        result, colors = self.result, self.colors or colors_of(self.result)
        origins = self.origins or [("", result)]
        curves = {name: curve for name, curve in self.curves.items() if curve.losses}
        return render(
            title=self.title,
            lead=self.lead,
            tiles=self.tiles,
            recipes=self.recipes,
            colors=colors,
            costs=_costs(self.compared or result, self.costs, apart=self.compared is not None) if self.costs else None,
            names=result.names,
            reference=result.reference,
            seeds=self.seeds if max(self.seeds.values(), default=1) > 1 else {},
            blocks=blocks_of(result) if self.blocks is None else self.blocks,
            context=context_charts(result, colors),
            needles=needle_maps(result),
            curves={"legend": [(name, colors[name]) for name in curves], "charts": curve_charts(curves, colors)}
            if curves
            else None,
            picture=selected_blocks(self.picture) if self.picture else None,
            keys=_keys(self.keys) if self.keys else None,
            samples=self.samples,
            run=[
                (title, list(_what_was_run(origin)), origin.notes)
                for title, origin in origins
                if origin.run or origin.models
            ],
        )

    def save(self, path: Path) -> None:
        write_whole(path, self.render())


def _costs(result: Result, costs: Costs, *, apart: bool) -> dict[str, Any]:
    """What each method finds against what it reads; the tables of the terminal, and each method's sizes."""
    sizes, colors = [], colors_of(result)
    for cost in costs.rows:
        phases = "sparse in " + " and ".join(cost.sparse_in) if cost.sparse_in else "dense"
        listed = ", ".join(f"{key} = {value}" for key, value in cost.sizes.items())
        if cost.patterns:
            listed += "; heads: " + ", ".join(f"{count} {name}" for name, count in sorted(cost.patterns.items()))
        paper = "arXiv:" + cost.paper.rsplit("/", 1)[-1]
        sizes.append((f"{cost.method} at {cost.length:,}", "; ".join(filter(None, [phases, listed, paper]))))
    charts = quality_charts(result, costs, colors)
    title = f"Attention methods on {result.run.get('model', 'one model')}" if apart else "Quality and cost"
    return {"title": title, "charts": charts, "tables": tables_of(result, costs), "colors": colors, "sizes": sizes}


def _keys(read: KeysRead) -> dict[str, Any]:
    rows, legend = [], keys_legend(read)
    for context, counted in zip(read.contexts, read.counted, strict=True):
        formula = [read.formula(attention, context) for attention, _ in legend]
        rows.append([f"{context:,}", *(f"{round(keys, 1):,}" for keys in formula), f"{counted:,.1f}"])
    heads = ["context", "dense", "window", TRAINED[read.attention].label, "counted"]
    return {"lead": _formula(read), "heads": heads, "rows": rows, "legend": legend, "chart": keys_chart(read)}


def _formula(read: KeysRead) -> str:
    """In words, with the model's sizes."""
    c = read.config
    if isinstance(c, InfLLMv2Config):
        said = (
            f"InfLLM-V2 reads n·b keys at context s, and s/d pooled ones to choose them: here n = "
            f"{c.blocks.num_selected_blocks}, b = {c.block_size}, d = {c.kernel_stride}; of up to {c.sees_all:,} "
            "tokens it reads all."
        )
    else:
        said = (
            f"NSA reads s/d + n·l′ + w keys at context s: here d = {c.compress_stride}, n = {c.num_selected_blocks}, "
            f"l′ = {c.select_block_size}, w = {c.window_size}, compressed keys counted as one each."
        )
    if read.dense:
        said += (
            f" {len(read.dense)} of {len(read.dense) + read.sparse} layers are dense: its keys are the mean over all."
        )
    return said


def _what_was_run(result: Result) -> Iterator[tuple[str, str, str]]:
    """(name, value, code) of command, date, versions, hardware, models and the tasks' parameters: the origin of every
    number."""
    if run := result.run:
        hardware = run["hardware"]
        devices = [hardware["processor"], f"{hardware['threads']} threads", hardware["device"], hardware["system"]]
        yield "command", "", run["command"]
        yield "date", run["date"], ""
        yield "versions", ", ".join(f"{name} {number}" for name, number in run["versions"].items()), ""
        yield "hardware", ", ".join(filter(None, devices)), ""
    for model in result.models:
        sizes = f"{model['num_parameters']:,} parameters, {model['num_layers']} layers"
        details = f"{model['attention']} attention, {sizes}, vocabulary of {model['vocab_size']:,}"
        if model["attention"] != "dense" and model["nsa"]:
            details += "; " + _parameters(model["nsa"])
        if model.get("dense_layers"):
            details += "; dense layers " + " ".join(map(str, model["dense_layers"]))
        if model.get("by_mass"):
            details += "; blocks chosen by their exact attention mass"
        yield model["name"], details, model["folder"]
    for task, values in result.tasks.items():
        yield task, _parameters(values), ""


def _parameters(values: Mapping[str, Any]) -> str:
    lists = {key: " ".join(map(str, v)) if isinstance(v, list | tuple) else v for key, v in values.items()}
    return ", ".join(f"{key} = {value}" for key, value in lists.items())
