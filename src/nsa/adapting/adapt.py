"""`nsa adapt`: its stages one after another, each a run as `nsa train` makes it, and what came of them."""

import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nsa.adapting.arguments import AdaptArguments
from nsa.adapting.convert import RECORD
from nsa.adapting.folder import find_model
from nsa.adapting.layers import train_what_is_new
from nsa.adapting.low_rank import add_low_rank, merge
from nsa.adapting.source import read_config
from nsa.adapting.trainers import LayerTrainer, TaughtTrainer
from nsa.config import NSAConfig
from nsa.eval.files import read_object
from nsa.eval.models import device_of
from nsa.eval.scoring import token_losses
from nsa.eval.tasks.perplexity import Perplexity
from nsa.eval.text import held_out_of
from nsa.training.compiling import NOTICE, compile_layers
from nsa.training.config import TrainConfig
from nsa.training.folder import at_home, is_trained, last_checkpoint
from nsa.training.loading import load_model
from nsa.training.tokenizer import load_tokenizer
from nsa.training.train import train
from nsa.training.trainer import WholeCheckpointTrainer
from nsa.training.world import launched

RESULT, OPTIONS = "adapt.json", "adapt_options.json"
# What may differ when a run goes on.
FREE = ("out", "resume", "quiet", "log_every", "save_every", "cache_dir", "threads")
ROWS = 8  # of held-out text that the models are compared on, at most


@dataclass(frozen=True)
class Stage:
    """A run: its configuration, the model it begins with (of the configuration and the tokenizer), and its Trainer."""

    config: TrainConfig
    make: Callable[..., Any]
    trainer: Callable[..., WholeCheckpointTrainer]


def adapt(arguments: AdaptArguments) -> None:
    """As `AdaptArguments` says."""
    if launched() > 1:
        raise ValueError("nsa adapt runs in one process; start it without torchrun or accelerate launch")
    arguments = replace(arguments, sparse=find_model(arguments.sparse))
    sparse = _sparse_config(arguments.sparse)
    out, dense = at_home(arguments.out), _dense_folder(arguments)
    stages = _stages(arguments, out, dense, sparse)
    if not stages:
        raise ValueError("nothing to do: expected a curriculum in --first or in --second")
    if arguments.lora > 0 and not arguments.second:
        raise ValueError(f"--lora {arguments.lora} is of stage 2: expected a curriculum in --second")
    for stage in stages.values():
        stage.config.validate()
    length = max(stage.config.context for stage in stages.values())
    _check_models(arguments, sparse, dense, length)
    rows = _rows(arguments, length)  # before the work, for there may be none of this length
    _claim(arguments, out)
    for name, stage in stages.items():
        if is_trained(stage.config.out):
            _say(f"{name} is done")
            continue
        _say(f"{name}: {stage.config.total_steps} steps")
        train(stage.config, make=stage.make, trainer=stage.trainer, finish=merge)
    folders = {"dense": dense, "converted": arguments.sparse, **{name: out / name for name in stages}}
    _report(arguments, out, folders, rows)


def _stages(arguments: AdaptArguments, out: Path, dense: Path, sparse: Any) -> dict[str, Stage]:
    stages = {}
    trainer: Callable[..., WholeCheckpointTrainer]
    if arguments.first:
        config = _config(arguments, out / "stage-1", sparse, arguments.first, arguments.first_rate)
        config = replace(config, selector_loss=0.0)  # its own loss has it already
        trainer = _taught(LayerTrainer, dense, arguments.blocks_weight)
        stages["stage-1"] = Stage(config, partial(_new_alone, arguments.sparse), trainer)
    if arguments.second:
        config = _config(arguments, out / "stage-2", sparse, arguments.second, arguments.second_rate)
        start = out / "stage-1" if arguments.first else arguments.sparse
        trainer = WholeCheckpointTrainer
        if arguments.teacher_weight:
            trainer = _taught(partial(TaughtTrainer, compile=arguments.compile), dense, arguments.teacher_weight)
        stages["stage-2"] = Stage(config, partial(_all, start, arguments), trainer)
    if arguments.second and arguments.twin:
        config = _config(arguments, out / "dense-trained", sparse, arguments.second, arguments.second_rate)
        config = replace(config, attention="dense", dense_layers=())
        stages["dense-trained"] = Stage(config, partial(_all, dense, arguments), WholeCheckpointTrainer)
    return stages


def _config(
    arguments: AdaptArguments, folder: Path, sparse: Any, curriculum: tuple[str, ...], rate: float
) -> TrainConfig:
    """A training run's configuration; of the model itself it says what `nsa report` counts the keys of a query by."""
    shared = {field.name for field in fields(TrainConfig)} & {field.name for field in fields(AdaptArguments)}
    values = {name: getattr(arguments, name) for name in shared - {"out", "resume", "compile"}}
    return TrainConfig(
        out=folder, attention=sparse.attention, num_layers=sparse.num_hidden_layers,
        dense_layers=tuple(sparse.dense_layers or ()), nsa=NSAConfig.from_dict(sparse.nsa),
        infllm_v2=sparse.infllm_v2_config, curriculum=curriculum, learning_rate=rate, tokenizer=str(arguments.sparse),
        compile=False, resume=last_checkpoint(folder) is not None, weight_decay=0.0, **values,
    )  # fmt: skip


def _new_alone(folder: Path, config: TrainConfig, tokenizer: Any) -> Any:
    model, _ = load_model(folder, dtype=torch.float32)
    train_what_is_new(model)
    return model


def _all(folder: Path, arguments: AdaptArguments, config: TrainConfig, tokenizer: Any) -> Any:
    model, _ = load_model(folder, dtype=torch.float32)
    model.requires_grad_(True)
    if arguments.lora:
        torch.manual_seed(config.seed)
        add_low_rank(model, arguments.lora)
    if arguments.compile:
        compile_layers(model, on_cpu=config.device == "cpu" or not torch.cuda.is_available())
        _say(NOTICE)
    return model


def _taught(trainer: Callable[..., Any], dense: Path, weight: float) -> Callable[..., Any]:
    """The Trainer beside the dense model, which is loaded when it begins."""

    def made(**options: Any) -> Any:
        teacher, _ = load_model(dense, dtype=torch.bfloat16 if options["args"].bf16 else torch.float32)
        return trainer(dense=teacher.eval().requires_grad_(False), weight=weight, **options)

    return made


def _sparse_config(folder: Path) -> Any:
    """Of the converted model; ValueError in one line where it is none."""
    config = read_config(folder)
    if not getattr(config, "sparse_layers", []):
        raise ValueError(f"{folder} is not a model that nsa convert made: it has no sparse layer")
    return config


def _dense_folder(arguments: AdaptArguments) -> Path:
    if arguments.dense is not None:
        return find_model(arguments.dense)
    try:
        return find_model(Path(json.loads((arguments.sparse / RECORD).read_text(encoding="utf-8"))["dense"]))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{arguments.sparse} names no dense model that is still there; expected its folder as --dense"
        ) from error


def _check_models(arguments: AdaptArguments, sparse: Any, dense: Path, context: int) -> None:
    """ValueError in one line where the sparse model cannot come from the dense one, or options are not theirs."""
    other = read_config(dense)
    if arguments.first and sparse.attention != "nsa":
        raise ValueError(f"--first: attention={sparse.attention!r} has no new weights to train; give it no curriculum")
    if getattr(other, "attention", "dense") != "dense":
        raise ValueError(f"--dense: {dense} has attention={other.attention!r}; expected the dense model")
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size"):
        if getattr(sparse, name) != getattr(other, name):
            raise ValueError(
                f"--dense: {dense} has {name}={getattr(other, name)}, the converted model {getattr(sparse, name)}"
            )
    if context > sparse.max_position_embeddings:
        raise ValueError(f"rows of {context} tokens: the model has {sparse.max_position_embeddings} positions")
    for name in ("blocks_weight", "selector_loss", "teacher_weight", "lora"):
        if not 0 <= getattr(arguments, name) < float("inf"):
            raise ValueError(
                f"--{name.replace('_', '-')}: expected 0 or more, and finite, got {getattr(arguments, name)}"
            )


def _claim(arguments: AdaptArguments, out: Path) -> None:
    """Keep the options beside a new run; ValueError in one line where those of a continued one are others."""
    text, path = json.dumps(_options(arguments), indent=2) + "\n", out / OPTIONS
    if arguments.resume:
        if not path.is_file():
            raise ValueError(f"--resume: there is no run in {out}")
        # An option that a run is older than has its default there.
        saved = _options(AdaptArguments(sparse=arguments.sparse)) | read_object(
            path, "the options of a run of nsa adapt"
        )
        now = _options(arguments)
        changed = [f"{name}: {saved.get(name)!r}, now {now[name]!r}" for name in now if saved.get(name) != now[name]]
        if changed:
            raise ValueError(f"--resume: the run in {out} has other options ({'; '.join(changed)})")
        return
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; expected a folder as --out")
    there = list(out.iterdir()) if out.is_dir() else []
    if there and (not path.is_file() or any(is_trained(run) or last_checkpoint(run) for run in there)):
        raise ValueError(f"{out} is there and not empty; go on with --resume or choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _options(arguments: AdaptArguments) -> dict[str, Any]:
    """As JSON has them, but for those that may change."""
    given = {name: value for name, value in vars(arguments).items() if name not in FREE}
    return json.loads(json.dumps(given, default=str))


@torch.no_grad()
def _report(arguments: AdaptArguments, out: Path, folders: dict[str, Path], rows: torch.Tensor) -> None:
    """Losses of every model on the same held-out rows, of all positions and of their later half."""
    device, found, length = device_of(arguments.device), {}, rows.shape[1]
    print(f"loss on held-out rows of {length:,} tokens: all, after {length // 2:,}")
    for name, folder in folders.items():
        model, _ = load_model(folder, dtype=torch.float32)
        losses = token_losses(model.to(device).eval(), rows).double()
        found[name] = [round(part.mean().item(), 4) for part in (losses, losses[:, length // 2 :])]
        print(f"  {name:<14}{found[name][0]:8.4f}{found[name][1]:8.4f}", flush=True)
    (out / RESULT).write_text(json.dumps({"length": length, "loss": found}, indent=2) + "\n", encoding="utf-8")
    last = [folder for name, folder in folders.items() if name.startswith("stage")][-1]
    print(f"The model lies in {last}:\n  nsa generate {shlex.quote(str(last))} --prompt 'Once'")


def _rows(arguments: AdaptArguments, length: int) -> torch.Tensor:
    """Held-out text of `length` tokens in a row, as many as there are, up to ROWS."""
    source, tokenizer = held_out_of(arguments.data, arguments.text_field), load_tokenizer(str(arguments.sparse))
    for samples in range(ROWS, 1, -1):
        try:
            return Perplexity(length=length, samples=samples, text=source).sequences(tokenizer)
        except ValueError:
            continue
    return Perplexity(length=length, samples=1, text=source).sequences(tokenizer)


def _say(line: str) -> None:
    print(f"nsa adapt: {line}", file=sys.stderr, flush=True)
