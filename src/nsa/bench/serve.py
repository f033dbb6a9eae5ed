"""`nsa bench serve`: servers under load, a line for each and each rate."""

import asyncio
import json
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from nsa.bench.result import when_and_where
from nsa.bench.serve_arguments import ServeArguments
from nsa.bench.show import Table
from nsa.serving.load import Load, send, summary


def measure(arguments: ServeArguments) -> None:
    """Measure, write, print.

    Raises:
        ValueError: sizes that are not positive, a server that is none, or files that are there already.
    """
    for name in ("requests", "prompt_length", "new_tokens"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"{name}: expected at least 1, got {getattr(arguments, name)}")
    if any(rate < 0 for rate in arguments.rates):
        raise ValueError(f"rates: expected requests a second, at least 0, got {list(arguments.rates)}")
    if arguments.tokens[0] >= arguments.tokens[1]:
        raise ValueError(f"tokens: expected a first number and a larger one behind the last, got {arguments.tokens}")
    paths = [] if arguments.output is None else [arguments.output.with_name(arguments.output.name + x) for x in ENDS]
    for path in paths:
        if path.exists():
            raise ValueError(f"{path} is there already and would be lost; give another --output")
    key = arguments.api_key or os.environ.get("VLLM_API_KEY")
    lines = []
    for rate in arguments.rates:
        load = Load(
            rate, arguments.requests, arguments.prompt_length, arguments.new_tokens, arguments.tokens, arguments.seed
        )
        for server in arguments.servers:
            model, answers, seconds = asyncio.run(send(server, load, key))
            lines.append({"model": model, "server": server, "rate": rate, **summary(answers, seconds)})
            if (failed := [answer.error for answer in answers if answer.error]) and len(failed) == len(answers):
                raise ValueError(f"{server}: expected answers, got {failed[0]} for all {len(failed)} requests")
    shape = {name: x for name, x in asdict(arguments).items() if name not in ("output", "json", "api_key")}
    facts = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), **when_and_where()}
    found: dict[str, Any] = {"bench": "serve", "facts": facts, "shape": shape, "lines": lines}
    table = _table(arguments, lines)
    text = f"{table.markdown()}\n\n{', '.join(f'{name} {value}' for name, value in facts.items())}\n"
    for path, what in zip(paths, (json.dumps(found, indent=1), text), strict=False):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        path.write_text(what, encoding="utf-8")
    if arguments.json:
        print(json.dumps(found, indent=1))
    else:
        Console().print(table.rich())


ENDS = (".json", ".md")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _table(arguments: ServeArguments, lines: list[dict[str, Any]]) -> Table:
    title = f"{arguments.requests} requests of {arguments.prompt_length} + {arguments.new_tokens} tokens"
    header = ["model", "arrivals/s", "requests/s", "tokens/s", "first token ms", "p99", "between tokens ms", "p99",
              "failed"]  # fmt: skip
    names = ("requests_per_s", "tokens_per_s", "first_token_ms_median", "first_token_ms_p99",
             "between_tokens_ms_median", "between_tokens_ms_p99")  # fmt: skip
    rows = [
        [line["model"], f"{line['rate']:g}" if line["rate"] else "at once", *(_number(line[name]) for name in names),
         str(line["failed"])]
        for line in lines
    ]  # fmt: skip
    return Table(title, header, rows)
