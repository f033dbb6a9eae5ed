"""`nsa train`: a model from nothing, on transformers' Trainer.

What is here is what the Trainer does not do by itself: batches in the order of their numbers, checkpoints that
appear whole or not at all, metrics in files, and one clear line for what a user can repair.
"""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments, set_seed

from nsa.costs.devices import peak_of
from nsa.costs.flops import flops_per_token, mean_keys
from nsa.models import NSALlamaConfig
from nsa.training.all_blocks import AllBlocks
from nsa.training.cache import Cache
from nsa.training.clock import Clock
from nsa.training.compiling import NOTICE, compile_parts
from nsa.training.config import TrainConfig, differences
from nsa.training.corpus import Corpus, read_corpus
from nsa.training.data import FixedBatches, TrainingBatches
from nsa.training.folder import (
    at_home,
    check_checkpoint,
    check_free,
    is_sharded,
    is_trained,
    last_checkpoint,
    step_of,
)  # fmt: skip
from nsa.training.lock import claimed
from nsa.training.metrics import MetricsFiles, Progress
from nsa.training.prepare import (
    check_same_data,
    fingerprints,
    make_data,
    make_model,
    make_tokenizer,
    train_selectors,
)
from nsa.training.sharded import ShardedTrainer, distribute
from nsa.training.sizes import model_config
from nsa.training.stopping import StopOnCtrlC
from nsa.training.trainer import WholeCheckpointTrainer
from nsa.training.world import World, joined, launched, mesh_shape


def train(
    config: TrainConfig,
    callbacks: Sequence[TrainerCallback] = (),
    *,
    make: Callable[..., Any] = make_model,
    trainer: Callable[..., WholeCheckpointTrainer] = WholeCheckpointTrainer,
    finish: Callable[[Any], None] | None = None,
) -> Any:
    """Train as configured; returns the model, which is also in `config.out` with its tokenizer and configuration.

    `callbacks` are transformers' own, beside those for metrics and progress. `make` gives the model to begin with, of
    the configuration and the tokenizer, and `trainer` the Trainer, in one process; `finish` is called with the model
    before it is saved for good.

    Raises:
        ValueError: a configuration, data or checkpoint that does not fit, or a loss that is no number any more, in
            one line.
        OSError: a checkpoint, or tokenized data, that could not be written, in one line; the last checkpoint is whole.
        KeyboardInterrupt: stopped by the user; its text names the checkpoint to continue from.
    """
    config = replace(config, out=at_home(config.out))  # as transformers does with what it writes there
    last = last_checkpoint(config.out)
    if launched() == 1 and not (config.resume and last is not None and is_sharded(last)):
        config.validate()
        mesh_shape(config, 1)
        with claimed(config.out):
            return _train(config, callbacks, None, make, trainer, finish)
    with joined(config) as world, claimed(config.out) if world.is_main else nullcontext():
        if (make, trainer, finish) != (make_model, WholeCheckpointTrainer, None):
            raise ValueError("several processes train from scratch (nsa train); start this one without torchrun")
        return _train(config, callbacks, world)


def _train(
    config: TrainConfig,
    callbacks: Sequence[TrainerCallback],
    world: World | None = None,
    make: Callable[..., Any] = make_model,
    make_trainer: Callable[..., WholeCheckpointTrainer] = WholeCheckpointTrainer,
    finish: Callable[[Any], None] | None = None,
) -> Any:
    is_main, say = world is None or world.is_main, _say if world is None or world.is_main else _say_nothing
    checkpoint = _checkpoint(config) if world is None else world.from_main(lambda: _checkpoint(config, sharded=True))
    arguments = _arguments(config, 1 if world is None else world.dp)
    if make is make_model:
        model_config(config)  # what no model can have is refused before data is read
    if config.threads:
        torch.set_num_threads(config.threads)
    set_seed(config.seed)
    cache = Cache(config.cache_dir, say)
    corpus = read_corpus(config.data, config.max_bytes, config.text_field)
    for remark in corpus.remarks:
        say(remark)

    first = _here if world is None else world.main_first
    tokenizer, train_set, eval_sets = first(partial(_make_batches, config, corpus, cache))
    data = fingerprints(corpus, tokenizer)
    del corpus  # its texts, which may be gigabytes
    if checkpoint is None and is_main:
        config.save(config.out)  # by which a run that fails from here on leaves a folder to begin again in
    check_data = partial(check_same_data, config.out, data, resume=checkpoint is not None)
    if world is None:
        check_data()
    else:
        world.from_main(check_data)
        world.agree("data", data, lambda theirs, own: "other data, or another tokenizer, than rank 0")
    model = make(config, tokenizer)
    if world is not None:
        if config.compile and config.cuda_graphs and not arguments.use_cpu:
            say(
                "several processes compile each layer and make no CUDA graphs: gathered weights lie elsewhere each time"
            )
        distribute(model, world, config, on_cpu=arguments.use_cpu)
    elif config.compile:
        compile_parts(model, on_cpu=arguments.use_cpu, cuda_graphs=config.cuda_graphs)
    if config.compile:
        say(NOTICE)

    on_gpu = not arguments.use_cpu
    peak = _peak(model, make_trainer) if on_gpu and config.dtype == "bfloat16" else None
    clock = Clock(None if peak is None else peak * (1 if world is None else world.size))
    metrics, progress = MetricsFiles(config.out, clock), Progress()
    stop = StopOnCtrlC(quiet=config.quiet or not is_main, any_rank=None if world is None else world.any)
    all_blocks = AllBlocks(model, config.stages)
    records = [metrics, *([] if config.quiet else [progress])] if is_main else []
    options: dict[str, Any] = {
        "clock": clock,
        "flops_of_token": _flops_of_token(model.config, train_set, config.accumulation) if peak else None,
        "workers": config.workers if on_gpu else 0,
        "model": model,
        "args": arguments,
        "train_dataset": train_set,
        "eval_dataset": eval_sets,
        "processing_class": tokenizer,
        "callbacks": [*records, stop, all_blocks, *callbacks],
    }
    trainer: WholeCheckpointTrainer
    if world is not None:
        trainer = ShardedTrainer(world=world, **options)
    else:
        in_cuda_graphs = config.compile and config.cuda_graphs and on_gpu
        trainer = make_trainer(in_cuda_graphs=in_cuda_graphs, **options)
    if checkpoint is not None and is_main:
        metrics.forget_after(step_of(checkpoint))
    try:
        train_selectors(model, config.selector_loss / arguments.gradient_accumulation_steps, config.selector_queries)
        with stop:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if trainer.state.global_step < config.total_steps:
            raise KeyboardInterrupt
        if finish is not None:
            finish(model)
        trainer.save_final(config.out)
    except KeyboardInterrupt:
        last = last_checkpoint(config.out)
        hope = f"continue from {last} with --resume" if last else "no checkpoint was written yet"
        raise KeyboardInterrupt(f"stopped at step {trainer.state.global_step}; {hope}") from None
    finally:
        progress.close()
        all_blocks.restore()
        train_selectors(model, 0.0)  # what the caller trains with it further is the caller's
    return model


def _here(make: Callable[[], Any]) -> Any:
    return make()


def _make_batches(
    config: TrainConfig, corpus: Corpus, cache: Cache
) -> tuple[PreTrainedTokenizerBase, TrainingBatches, dict[str, FixedBatches]]:
    tokenizer = make_tokenizer(config, corpus, cache)
    return tokenizer, *make_data(config, corpus, tokenizer, cache)


def _checkpoint(config: TrainConfig, *, sharded: bool = False) -> Path | None:
    """The checkpoint to continue from, None for a new run; ValueError if the folder does not fit the request."""
    if not config.resume:
        check_free(config.out)
        return None
    last = last_checkpoint(config.out)
    if last is None:
        raise ValueError(f"--resume: there is no checkpoint in {config.out}")
    saved = TrainConfig.load(config.out).to_dict()
    if changed := differences(saved, config):
        raise ValueError(f"--resume: the checkpoint in {config.out} has another configuration ({'; '.join(changed)})")
    if is_trained(config.out):
        raise ValueError(f"--resume: the run in {config.out} has come to its end; nothing is left to do")
    check_checkpoint(last)
    if sharded and not is_sharded(last):
        raise ValueError(f"--resume: {last} was written by one process, which alone continues it: without torchrun")
    return last


def _peak(model: Any, make_trainer: Callable[..., Any]) -> float | None:
    """Operations a second that the GPU does at most; None where they, or those of a step, are not known.

    Known are those of a Llama all of whose layers are alike, where all of its weights are trained, by its loss alone.
    """
    alike = isinstance(model.config, NSALlamaConfig) and not model.config.dense_layers
    whole = make_trainer is WholeCheckpointTrainer and all(weight.requires_grad for weight in model.parameters())
    return peak_of(torch.cuda.get_device_name()) if alike and whole else None


def _flops_of_token(model: NSALlamaConfig, train_set: TrainingBatches, batches_per_step: int) -> Callable[[int], float]:
    """Number of a step -> floating-point operations for each of its tokens, on average over its stage."""

    @lru_cache
    def of_stage(which: int) -> float:
        stage = train_set.stages[which]
        keys = mean_keys(model, stage.length if stage.all_blocks else 0)
        return flops_per_token(model, train_set.mean_over_tokens(which, keys))

    return lambda step: of_stage(train_set.stage_of(step * batches_per_step))


def _arguments(config: TrainConfig, dp: int = 1) -> TrainingArguments:
    steps = config.total_steps
    on_cpu = config.device == "cpu" or not torch.cuda.is_available()
    if config.device == "cuda" and on_cpu:
        raise ValueError("--device cuda: torch sees no CUDA device here")
    _quiet_libraries()
    arguments = TrainingArguments(
        output_dir=str(config.out),
        max_steps=steps,
        per_device_train_batch_size=1,  # an item of the dataset is a whole batch
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=config.accumulation // dp,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        learning_rate=config.learning_rate,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={
            "num_decay_steps": round(config.decay_share * steps),
            "min_lr_ratio": 0.05,
            "decay_type": "linear",
        },
        warmup_steps=min(config.warmup_steps, steps),
        weight_decay=config.weight_decay,
        adam_beta2=config.beta2,
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch_fused",
        gradient_checkpointing=config.gradient_checkpointing,
        bf16=config.dtype == "bfloat16",
        use_cpu=on_cpu,
        seed=config.seed,
        data_seed=config.seed,
        eval_strategy="steps" if config.eval_every else "no",
        eval_steps=config.eval_every or None,
        prediction_loss_only=True,
        save_strategy="steps" if config.save_every else "no",
        save_steps=config.save_every or steps,
        save_total_limit=config.keep_checkpoints,
        logging_steps=config.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it would show NaN as 0.0, and ask the device in every step
        report_to=list(config.report_to),
        disable_tqdm=True,  # nsa.training.metrics.Progress shows one bar instead
        dataloader_num_workers=0,  # evaluation's; those of training are the Trainer's own
        dataloader_pin_memory=not on_cpu,
        accelerator_config={"non_blocking": not on_cpu},
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several would cut a packed row into pieces
    return arguments


def _quiet_libraries() -> None:
    """Their warnings speak of options that a user of this command cannot set."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(torch|accelerate|transformers)\.")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # workers are forked after it, which it warns of otherwise


def _say_nothing(line: str) -> None:
    """Another process speaks."""


def _say(line: str) -> None:
    print(f"nsa train: {line}", file=sys.stderr, flush=True)
