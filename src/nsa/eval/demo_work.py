"""The demo's work: training a twin, judging it, and the report on all of them.

Processes of their own do it (nsa.eval.workers), so that `nsa demo` itself imports neither torch nor transformers.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from nsa.config import NSAConfig
from nsa.eval.blocks import keys_per_query
from nsa.eval.models import Candidate, load
from nsa.eval.pictures import Curve, KeysRead
from nsa.eval.regions import BEYOND, OUT_OF_REACH
from nsa.eval.report import Report
from nsa.eval.result import Result, paired_difference
from nsa.eval.runner import evaluate, result_of
from nsa.eval.tasks import Needle, Perplexity, Recall, Row, Task
from nsa.training.config import TrainConfig
from nsa.training.folder import is_trained, last_checkpoint
from nsa.training.train import train


def finish_twin(twin: str, config: TrainConfig, processes: int) -> list[dict[str, Any]]:
    """Train and judge in silence, with a share of the threads."""
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    train_twin(replace(config, quiet=True))
    return judge_twin(twin, config, quiet=True)


def train_twin(config: TrainConfig) -> None:
    """Train, or go on training, what is not trained already."""
    if not is_trained(config.out):
        train(replace(config, resume=last_checkpoint(config.out) is not None))


def judge_twin(twin: str, config: TrainConfig, *, quiet: bool = False) -> list[dict[str, Any]]:
    """The rows of a trained twin."""
    console = Console(stderr=True, quiet=quiet)
    result = evaluate([load(config.out, name=twin)], tasks_for(config), console=console)
    return [asdict(row) for row in result.rows[twin]]


def tasks_for(config: TrainConfig) -> list[Task]:
    """The demo's questions, up to the length that the twins were trained on."""
    length = config.context
    return [
        Recall(
            length=length, window_size=config.nsa.window_size, num_layers=config.num_layers, hops=(1,), samples=100,
            seed=config.seed,
        ),
        Perplexity(length=length, samples=64),
        Needle(lengths=(length // 4, length // 2, length), samples=6, seed=config.seed),
    ]  # fmt: skip


def write_report(
    recipes: Mapping[str, TrainConfig], rows: Mapping[str, list[dict[str, Any]]], path: Path
) -> dict[str, Any]:
    """report.html, and what demo.json says."""
    candidates = [load(config.out, name=twin) for twin, config in recipes.items()]
    found = {twin: [Row.from_dict(row) for row in rows[twin]] for twin in recipes}
    report = describe(candidates, result_of(candidates, tasks_for(recipes["nsa"]), found), recipes["nsa"])
    report.save(path)
    return summarize(report)


def describe(candidates: list[Candidate], result: Result, config: TrainConfig) -> Report:
    """The report, with the demo's own words at its top."""
    report = Report.of(
        candidates,
        result,
        text="python",
        title="Three attentions, one model",
        lead=f"Three small language models that differ in their attention only, trained for {config.total_steps} steps "
        "each on this machine's Python sources, and judged on packages and names that none of them has seen.",
    )
    rows = {name: recall_of(result, name) for name in result.names}
    far = {name: found.get(OUT_OF_REACH) or found[BEYOND] for name, found in rows.items()}
    loss = {name: result.of_task(name, Perplexity.name)[0] for name in result.names}
    difference, error = paired_difference(loss["nsa"], loss["dense"])
    report.tiles = [
        (
            f"{far['nsa'].value:.0%}",
            f"of the values that no window reaches are found by NSA; by dense attention {far['dense'].value:.0%}, "
            f"by windows alone {far['window'].value:.0%}",
        ),
        (f"{difference:+.3f}", f"nats per token: NSA's loss on held-out text less dense attention's, ± {error:.3f}"),
        (
            f"{keys_of('nsa', config.nsa, config.context, report.keys):,.0f} of {config.context:,}",
            f"keys are read by NSA's query at the end of a text of {config.context:,} tokens",
        ),
    ]
    return report


def summarize(report: Report) -> dict[str, Any]:
    """demo.json: the table's rows, a sample, and the whole result."""
    result = report.result
    reference = result.of_task("dense", Perplexity.name)[0]
    length = result.tasks[Perplexity.name]["length"]
    table = {}
    for model in result.models:
        name = model["name"]
        loss, recall = result.of_task(name, Perplexity.name)[0], recall_of(result, name)
        difference, error = paired_difference(loss, reference)
        table[name] = {
            "loss": loss.value,
            "loss_error": loss.error,
            "difference": difference,
            "difference_error": error,
            "recall": {region: [row.correct, row.n, row.low, row.high] for region, row in recall.items()},
            "keys_per_query": keys_of(name, NSAConfig.from_dict(model["nsa"]), length, report.keys),
            "context": length,
            "seconds_per_step": report.curves.get(name, Curve()).seconds_per_step,
        }
    prompt, text = report.samples["nsa"]
    return {"table": table, "sample": {"prompt": prompt, "text": text}, "result": json.loads(result.to_json())}


def recall_of(result: Result, name: str) -> dict[str, Row]:
    return {row.where["region"]: row for row in result.of_task(name, Recall.name)}


def keys_of(attention: str, config: NSAConfig, context: int, read: KeysRead | None) -> float:
    """Counted in the model for NSA, by definition for the others."""
    if attention == "nsa" and read is not None:
        return read.counted[-1]
    return keys_per_query(attention, config, context)
