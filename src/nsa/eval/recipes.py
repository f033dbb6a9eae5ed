"""Runs of `nsa train` side by side: runs that differ in their seed alone are one recipe, and recipes are compared seed
by seed."""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nsa.config import InfLLMv2Config, NSAConfig
from nsa.eval.files import read_object, read_records
from nsa.methods.registry import TRAINED
from nsa.training.config import TrainConfig
from nsa.training.curriculum import parse_curriculum
from nsa.training.folder import CONFIG_FILE, METRICS_FILE

NOT_THE_RECIPE = ("out", "seed", "preset", "resume", "cache_dir", "quiet", "workers", "log_every", "report_to")
SIZES: dict[str, Callable[[Any], Any]] = {"nsa": NSAConfig.from_dict, "infllm_v2": InfLLMv2Config.from_dict}
LOSSES = {"eval_text_loss": "held-out loss", "eval_retrieval_loss": "answers' loss"}


@dataclass(kw_only=True)
class Run:
    """What one run has recorded: each loss by tokens seen, in the order of training.

    `keys` is what the last query of a row of `context` tokens reads, the longest of training, mean over the layers.
    """

    folder: Path
    seed: int
    attention: str
    settings: dict[str, Any]
    losses: dict[str, dict[int, float]] = field(default_factory=lambda: {name: {} for name in LOSSES})
    tokens_per_second: float = math.nan
    minutes: float = math.nan
    context: int = 0
    keys: float = math.nan

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """ValueError in one line for a folder in which no run has recorded anything."""
        if not (folder / CONFIG_FILE).is_file():
            raise ValueError(f"{folder} holds no run of nsa train: expected {CONFIG_FILE} and {METRICS_FILE} in it")
        given = read_object(folder / CONFIG_FILE, "the configuration of a run of `nsa train`")
        settings = {
            name: value for name, value in (TrainConfig().to_dict() | given).items() if name not in NOT_THE_RECIPE
        }
        seed, attention = given.get("seed", 0), given.get("attention", "nsa")
        if not isinstance(seed, int) or not isinstance(attention, str):
            raise ValueError(
                f"{folder / CONFIG_FILE}: expected an integer seed and a named attention, got {seed!r}, {attention!r}"
            )
        run = cls(folder=folder, seed=seed, attention=attention, settings=settings)
        run.context, run.keys = _keys_read(settings, attention, folder / CONFIG_FILE)
        tokens, speeds, seconds = 0, [], 0.0
        for record in read_records(folder / METRICS_FILE):
            found = {name: value for name, value in record.items() if isinstance(value, float | int)}
            found = {name: value for name, value in found.items() if math.isfinite(value)}
            tokens, seconds = int(found.get("tokens", tokens)), found.get("seconds", seconds)
            speeds += [found["tokens_per_second"]] if "tokens_per_second" in found else []
            for name in LOSSES.keys() & found.keys():
                run.losses[name][tokens] = found[name]
        if not tokens:
            raise ValueError(f"{folder / METRICS_FILE}: expected the records of a run, and it has none of a step")
        run.tokens_per_second = statistics.median(speeds[len(speeds) // 2 :]) if speeds else math.nan
        run.minutes = seconds / 60
        return run


@dataclass(kw_only=True)
class Recipe:
    """Runs of one configuration, one a seed."""

    name: str
    runs: dict[int, Run]

    @property
    def attention(self) -> str:
        return next(iter(self.runs.values())).attention

    def curve(self, loss: str) -> dict[int, tuple[float, float, float]]:
        """Tokens seen -> mean, lowest and highest over the seeds, where every seed has a value."""
        own = [run.losses[loss] for run in self.runs.values()]
        shared = sorted(set.intersection(*map(set, own)))
        columns = {tokens: [losses[tokens] for losses in own] for tokens in shared}
        return {tokens: (statistics.fmean(x), min(x), max(x)) for tokens, x in columns.items()}

    def against(self, other: "Recipe", loss: str) -> tuple[list[float], int] | None:
        """The difference of every shared seed after as many tokens, and the tokens.

        None where no seed is shared, or no number of tokens by then.
        """
        seeds = sorted(self.runs.keys() & other.runs.keys())
        pairs = [(self.runs[seed].losses[loss], other.runs[seed].losses[loss]) for seed in seeds]
        shared = set.intersection(*(own.keys() & theirs.keys() for own, theirs in pairs)) if pairs else set()
        if not shared:
            return None
        last = max(shared)
        return [own[last] - theirs[last] for own, theirs in pairs], last

    def differs(self, other: "Recipe") -> list[str]:
        """Settings of which the other recipe has another value: "nsa.window_size = 256, not 64"."""
        own, theirs = (_flat(next(iter(recipe.runs.values())).settings) for recipe in (self, other))
        names = [name for name in own | theirs if own.get(name) != theirs.get(name)]
        return [f"{name} = {own.get(name)}, not {theirs.get(name)}" for name in names]


def read_recipes(folders: Sequence[Path]) -> list[Recipe]:
    """Of the runs in `folders`, in their order.

    Raises:
        ValueError: no run there, or two of one configuration and one seed.
    """
    if not folders:
        raise ValueError("name at least one run's folder")
    recipes: dict[str, Recipe] = {}
    for folder in folders:
        run = Run.read(folder)
        key = json.dumps(run.settings, sort_keys=True)
        recipe = recipes.setdefault(key, Recipe(name="", runs={}))
        if run.seed in recipe.runs:
            twice = f"{recipe.runs[run.seed].folder} and {folder}"
            raise ValueError(f"{twice} are the same run: seed {run.seed} of one recipe; give one of them")
        recipe.runs[run.seed] = run
    found = list(recipes.values())
    for recipe in found:
        recipe.name = _name(recipe)
    for longer in (lambda folder: folder.name, str):
        names = [recipe.name for recipe in found]
        for recipe in found:
            if names.count(recipe.name) > 1:
                recipe.name = longer(next(iter(recipe.runs.values())).folder)
    return found


def _name(recipe: Recipe) -> str:
    """That of the folders without the seed."""
    seed, run = next(iter(recipe.runs.items()))
    name = run.folder.name
    for ending in (f"-seed{seed}", f"_seed{seed}", f"-{seed}", f"_{seed}"):
        name = name.removesuffix(ending)
    return name


def _keys_read(settings: dict[str, Any], attention: str, path: Path) -> tuple[int, float]:
    """The longest row of training, and the keys that its last query reads; ValueError where settings are damaged."""
    try:
        context = max(stage.length for stage in parse_curriculum(settings["curriculum"]))
        method = TRAINED[attention]
        read = method.reads(SIZES[method.sizes](settings[method.sizes])).last(context).keys
        dense, layers = len(settings["dense_layers"]), settings["num_layers"]
        return context, (dense * context + (layers - dense) * read) / layers
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: expected the settings of a run, got a damaged {error}") from error


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Fields of a field as "nsa.window_size"."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    return flat
