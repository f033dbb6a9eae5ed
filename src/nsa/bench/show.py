"""A result for people: tables in the terminal and in Markdown, a plot."""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from rich.console import Console

from nsa.bench.arguments import ShowArguments
from nsa.bench.result import Entry, Result
from nsa.files import write_whole
from nsa.report.table import Table

DENSE = ("cuDNN", "FlashAttention-2", "FlexAttention", "dense")
COLORS = {
    "NSA": "nsa",
    "NSA, correlated": "other-2",
    "cuDNN": "other-4",
    "FlashAttention-2": "window",
    "FlexAttention": "other-0",
    "FlexAttention, selected branch": "other-6",
    "dense": "dense",
    "window": "window",
    "phi": "other-5",
    "NSA, no graph": "other-2",
    "dense, FlashAttention-2": "window",
    "dense, cuDNN": "other-4",
    "dense, transformers": "dense",
}
DASHES = ("-", "--", ":", "-.")  # of the kinds of inputs


def tables(result: Result) -> list[Table]:
    """The tables of a result of any bench."""
    if result.bench == "decode":
        return [_microseconds(result, part) for part in _parts(result)]
    if result.bench == "train":
        return [_training(result, part) for part in _parts(result)]
    found = [_times(result, part) for part in _parts(result) if part != "kernels"]
    if any("rows" in entry.facts for entry in result.entries):
        found.append(_rates(result))
    if any(entry.gib for entry in result.entries):
        found.append(_memory(result))
    return found + [_kernels(result, inputs) for inputs in ("random", "correlated") if result.of("kernels", inputs)]


def _parts(result: Result) -> list[str]:
    return list(dict.fromkeys(entry.part for entry in result.entries))


def _names(entries: Sequence[Entry]) -> list[str]:
    return list(dict.fromkeys(name for entry in entries for name in entry.ms))


def _times(result: Result, part: str) -> Table:
    """Milliseconds; a rival's also as a multiple of NSA's; NSA's own rate and its share of the counted limit."""
    entries = result.of(part)
    names = _names(entries)
    header, rows = ["tokens", "inputs"], []
    has_u4, has_flops = any("U4" in x.facts for x in entries), any(x.flops for x in entries)
    header += ["U4"] * has_u4 + ["NSA, ms"] + ["TFLOP/s", "of the limit"] * has_flops
    others = [name for name in names if name != "NSA"]
    for entry in entries:
        own = entry.ms["NSA"]
        row = [f"{entry.length:,}", entry.inputs]
        row += [_number(entry.facts.get("U4"))] * has_u4 + [_number(own)]
        if has_flops:
            rate = entry.flops["NSA"] / own * 1e3
            row += [f"{rate / 1e12:.0f}", f"{rate / result.matrix_rate:.0%}"]
        for name in others:
            ms = entry.ms.get(name)
            row.append("" if ms is None else f"{_number(ms)} ({ms / own:.2f}x)")
        rows.append(row)
    return Table(f"{part}: milliseconds, and how many times NSA's", header + others, rows)


def _microseconds(result: Result, part: str) -> Table:
    """Of a step; a rival's also as a multiple of NSA's; the floor that the keys' bytes set; cells without room."""
    entries = result.of(part)
    names = _names(entries)
    rows = []
    for entry in entries:
        own = entry.ms.get("NSA")
        row = [f"{entry.length:,}", f"{entry.facts['batch']:.0f}"]
        row += [f"{entry.facts['floor']:.1f}", f"{entry.facts['dense floor']:.1f}"]
        for name in names:
            ms = entry.ms.get(name)
            ratio = "" if name.startswith("NSA") or not own or not ms else f" ({ms / own:.2f}x)"
            row.append("" if ms is None else f"{ms * 1e3:.1f}{ratio}")
        if "needs GiB" in entry.facts:
            row[4:5] = [f"no room for {entry.facts['needs GiB']:,.0f} GiB"]
        rows.append(row)
    header = ["tokens", "batch", "floor", "dense floor", *names]
    return Table(f"{part}: microseconds a step, and how many times NSA's", header, rows)


def _training(result: Result, model: str) -> Table:
    """Tokens a second, also over those of the faster dense twin of the same rows; what a step consists of; memory."""
    rows = []
    for entry in result.of(model):
        tokens, facts = entry.facts["tokens"], entry.facts
        dense = min((ms for name, ms in entry.ms.items() if name.split(",")[0] == "dense"), default=None)
        for name, ms in entry.ms.items():
            row = [f"{entry.length:,}", entry.inputs, f"{facts['documents']:.0f}", name, f"{tokens / ms * 1e3:,.0f}"]
            row += ["" if dense is None else f"{dense / ms:.2f}", _number(ms), _number(entry.gib.get(name))]
            row += [f"{facts[f'{name}: {what}']:.0f}" for what in ("launches", "host reads", "graphs")]
            rows.append([*row, f"{facts[f'{name}: waiting']:.1%}"])
        short = [name.split(":")[0] for name in facts if name.endswith(": out of memory")]
        rows += [[f"{entry.length:,}", entry.inputs, "", name, "out of memory", *[""] * 7] for name in short]
    header = [
        "row, tokens", "layout", "documents", "attention", "tokens/s", "of dense", "ms a step", "peak GiB",
        "launches", "host reads", "graphs compiled", "waiting for data",
    ]  # fmt: skip
    return Table(f"{model}: training steps of the same tokens", header, rows)


def _rates(result: Result) -> Table:
    """Tokens a second of whole batches; and of NSA's bytes a second what a plan of the same step counts."""
    entries = [entry for entry in result.entries if "rows" in entry.facts]
    names, rows = _names(entries), []
    for entry in entries:
        batch = entry.facts["rows"]
        row = [f"{entry.length:,}", entry.inputs, entry.part]
        row += [_number(batch / entry.ms[name] * 1e3) if name in entry.ms else "" for name in names]
        for name in ("NSA", "dense"):
            planned = entry.facts.get(f"{name}: bytes")
            best = min((ms for label, ms in entry.ms.items() if label.split(",")[0] == name), default=None)
            row.append("" if planned is None or best is None else f"{planned / best / 1e9:.2f}")
        rows.append(row)
    header = ["tokens", "inputs", "part", *names, "NSA, TB/s", "dense, TB/s"]
    return Table("tokens a second; and the bytes that a step must read over its time", header, rows)


def _memory(result: Result) -> Table:
    entries = [entry for entry in result.entries if entry.gib]
    names = list(dict.fromkeys(name for entry in entries for name in entry.gib))
    planned = [name for name in names if any(f"{name}: planned GiB" in entry.facts for entry in entries)]
    rows = [
        [f"{entry.length:,}", entry.inputs, *(_number(entry.gib.get(name)) for name in names)]
        + [_number(entry.facts.get(f"{name}: planned GiB")) for name in planned]
        for entry in entries
    ]
    header = ["tokens", "inputs", *names, *(f"{name}, planned" for name in planned)]
    what = "first token" if result.bench == "generate" else "forward + backward"
    return Table(f"peak memory, {what}, on top of inputs and weights: GiB", header, rows)


def _kernels(result: Result, inputs: str) -> Table:
    entries = result.of("kernels", inputs)
    rows = []
    for name in _names(entries):
        row = [name]
        for entry in entries:
            ms, flops = entry.ms.get(name), entry.flops.get(name)
            rate = "" if not flops or not ms else f" ({flops / ms / 1e9:.0f})"
            row.append(f"{_number(ms)}{rate}")
        rows.append(row)
    header = ["kernel", *(f"{entry.length:,}" for entry in entries)]
    return Table(f"each kernel alone, {inputs} inputs: milliseconds (TFLOP/s of what it must compute)", header, rows)


def crossover(result: Result, parts: Sequence[str]) -> float | None:
    """The length from which NSA (random inputs) takes less than the fastest dense attention, summed over `parts`.

    Between two measured lengths the ratio is taken as a power of the length. None where NSA never leads.
    """
    ratios: list[tuple[int, float]] = []
    for length in {x.length for x in result.entries}:
        entries = [x for part in parts for x in result.of(part, "random") if x.length == length]
        if len(entries) < len(parts):
            continue  # a run that was cut off
        own = sum(x.ms["NSA"] for x in entries)
        dense = [sum(x.ms[name] for x in entries) for name in DENSE if all(name in x.ms for x in entries)]
        if dense:
            ratios.append((length, min(dense) / own))
    ratios.sort()
    if not ratios or ratios[-1][1] < 1:
        return None
    for (short, low), (long, high) in pairwise(ratios):
        if low < 1 <= high:
            share = math.log(1 / low) / math.log(high / low)
            return short * (long / short) ** share
    return float(ratios[0][0])


def notes(result: Result) -> list[str]:
    """What the tables do not say: where it ran, the limit's rate, from which length NSA leads."""
    facts = ", ".join(f"{name} {value}" for name, value in result.facts.items())
    shape = ", ".join(f"{name}={value}" for name, value in result.shape.items() if name not in ("lengths", "rivals"))
    lines = [facts, shape, f"bf16 matrix products of 8192^3 in the same run: {result.matrix_rate / 1e12:.0f} TFLOP/s"]
    sets = [("forward",), ("backward",), ("forward", "backward"), ("forward + backward",), ("step",)]
    for parts in sets:
        if all(result.of(part, "random") for part in parts):
            length = crossover(result, parts)
            where = "at no length measured" if length is None else f"from about {length:,.0f} tokens on"
            lines.append(f"{' and '.join(parts)}: NSA takes less than the fastest dense attention {where}")
    for entry in result.of("step"):
        rates = ", ".join(f"{name} {entry.length / ms * 1e3:,.0f}" for name, ms in entry.ms.items())
        lines.append(f"tokens a second at {entry.length:,}: {rates}")
    return lines


def print_tables(result: Result) -> None:
    console = Console(markup=False, emoji=False)
    console.print(*notes(result), sep="\n", highlight=False)
    console.print(*(table.rich() for table in tables(result)), sep="")


def markdown(result: Result) -> str:
    head = "\n".join([f"# nsa bench {result.bench}", "", *(f"* {note}" for note in notes(result))])
    return "\n\n".join([head, *(table.markdown() for table in tables(result))]) + "\n"


def write(result: Result, stem: Path) -> None:
    """STEM.md and STEM.svg."""
    write_whole(stem.with_name(stem.name + ".md"), markdown(result))
    plot(result, stem.with_name(stem.name + ".svg"))


def plot(result: Result, path: Path) -> None:
    """Milliseconds over length, a chart a part, both axes logarithmic."""
    from nsa.report.charts import Charts, Series, as_file, draw

    charts: Charts = []
    for part in _parts(result):
        series: list[Series] = []
        for number, inputs in enumerate(dict.fromkeys(entry.inputs for entry in result.of(part) if entry.ms)):
            entries = sorted(result.of(part, inputs), key=lambda x: x.length)
            for name in _names(entries):
                label = name if inputs == "random" else f"{name}, {inputs}"
                color = COLORS.get(label) or COLORS.get(name) or f"other-{len(series) % 8}"
                points = [(x.length, x.ms[name]) for x in entries if name in x.ms]
                lengths, times = zip(*points, strict=True)
                series.append(Series(name=label, color=f"var(--{color})", x=lengths, y=times, dots=True,
                                     dash=DASHES[number % len(DASHES)]))  # fmt: skip
        if part != "kernels":
            chart = draw(series, title=part, x_label="tokens", y_label="milliseconds", log="xy", names="legend")
            charts.append((part, chart))
    write_whole(path, as_file(charts))


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def show(arguments: ShowArguments) -> None:
    """`nsa bench show`; ValueError in one line for a file that no bench wrote."""
    path = arguments.result
    if not path.is_file():
        raise ValueError(f"no such file: {path} (expected what `nsa bench ... --output` wrote)")
    try:
        result = Result.from_json(path.read_text(encoding="utf-8"))
        if arguments.output:
            write(result, arguments.output)
        print_tables(result)
    except (OSError, ImportError):
        raise
    except Exception as error:  # of a file by another program anything may be missing, or of another type
        raise ValueError(f"{path} is no result of nsa bench: {type(error).__name__}: {error}") from error
