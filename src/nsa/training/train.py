"""`nsa train`: a model from nothing, on transformers' Trainer.

What is here is what the Trainer does not do by itself: batches in the order of their numbers, checkpoints that
appear whole or not at all, metrics in files, and one clear line for what a user can repair.
"""

import json
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments, set_seed

from nsa.models import NSALlamaConfig, NSALlamaForCausalLM
from nsa.modules.attention import NativeSparseAttention
from nsa.training.config import CONFIG_FILE, TrainConfig, differences
from nsa.training.corpus import Corpus, read_corpus
from nsa.training.data import (
    FixedBatches,
    TrainingBatches,
    read_documents,
    retrieval_batches,
    text_batches,
)
from nsa.training.folder import is_trained, last_checkpoint
from nsa.training.metrics import MetricsFiles, Progress
from nsa.training.tokenizer import byte_tokenizer, encoder, load_tokenizer, train_bpe
from nsa.training.trainer import WholeCheckpointTrainer

RETRIEVAL_ROWS = 32


def train(config: TrainConfig, callbacks: Sequence[TrainerCallback] = ()) -> NSALlamaForCausalLM:
    """Train as configured; returns the model, which is also in `config.out` with its tokenizer and configuration.

    `callbacks` are transformers' own, beside those for metrics and progress.

    Raises:
        ValueError: a configuration, data or checkpoint that does not fit, in one line.
        OSError: a checkpoint that could not be written, in one line; the last one is whole.
        KeyboardInterrupt: stopped by the user; its text names the checkpoint to continue from.
    """
    config.validate()
    checkpoint = _prepare_folder(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    set_seed(config.seed)
    corpus = read_corpus(config.data, config.max_bytes)
    tokenizer = make_tokenizer(config, corpus)
    train_set, eval_sets = make_data(config, corpus, tokenizer)
    model = make_model(config, tokenizer)
    config.out.mkdir(parents=True, exist_ok=True)
    config.save(config.out)

    metrics = MetricsFiles(config.out)
    trainer = WholeCheckpointTrainer(
        model=model,
        args=_arguments(config),
        train_dataset=train_set,
        eval_dataset=eval_sets,
        processing_class=tokenizer,
        callbacks=[metrics, *([] if config.quiet else [Progress()]), *callbacks],
    )
    if checkpoint is not None:
        metrics.forget_after(_step_of(checkpoint))
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        trainer.save_final(config.out)
    except KeyboardInterrupt:
        last = last_checkpoint(config.out)
        hope = f"continue from {last} with --resume" if last else "no checkpoint was written yet"
        raise KeyboardInterrupt(f"stopped at step {trainer.state.global_step}; {hope}") from None
    return model


def make_tokenizer(config: TrainConfig, corpus: Corpus) -> PreTrainedTokenizerBase:
    if config.tokenizer == "bytes":
        return byte_tokenizer()
    if config.tokenizer == "bpe":
        if not corpus.train:
            raise ValueError("a bpe tokenizer is trained on text; for a token file name the folder of its tokenizer")
        return train_bpe((document.text for document in corpus.train), config.vocab_size)
    return load_tokenizer(config.tokenizer)


def make_data(
    config: TrainConfig, corpus: Corpus, tokenizer: PreTrainedTokenizerBase
) -> tuple[TrainingBatches, dict[str, FixedBatches]]:
    """Training batches, and evaluation's: held-out text, and retrieval with held-out names in held-out text."""
    encode = encoder(tokenizer)
    documents, held_out = read_documents(corpus, encode)
    for kind in (documents, held_out):
        top = int(kind.tokens[: 1 << 20].max(initial=0))
        if top >= len(tokenizer):
            raise ValueError(
                f"the data holds the token {top}, but the tokenizer has {len(tokenizer)}; name its own with --tokenizer"
            )
    filler = "\n".join(document.text for document in corpus.train) or tokenizer.decode(documents.tokens[:1_000_000])
    train_set = TrainingBatches(
        documents,
        config.stages,
        config.batch_tokens,
        encode=encode,
        filler=filler,
        seed=config.seed,
        layout=config.layout,
        batches_per_step=config.accumulation,
        answer_weight=config.answer_weight,
    )
    held_out_filler = "\n".join(document.text for document in corpus.validation) or tokenizer.decode(
        held_out.tokens[:1_000_000]
    )
    eval_sets = {"text": text_batches(held_out, config.context, config.batch_tokens, config.eval_tokens)}
    if any(stage.retrieval for stage in config.stages):
        eval_sets["retrieval"] = retrieval_batches(
            encode, held_out_filler, config.context, config.batch_tokens, RETRIEVAL_ROWS, config.seed
        )
    return train_set, eval_sets


def make_model(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> NSALlamaForCausalLM:
    """The model, its weights drawn from the seed."""
    torch.manual_seed(config.seed)
    model = NSALlamaForCausalLM(
        NSALlamaConfig(
            attention=config.attention,
            nsa=config.nsa.to_dict(),
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            intermediate_size=config.intermediate_size,
            max_position_embeddings=config.context,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            initializer_range=config.initializer_range,
            tie_word_embeddings=config.tie_embeddings,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    for module in model.modules():
        if isinstance(module, NativeSparseAttention):
            with torch.no_grad():
                module.g_proj.bias[0::3] = config.compressed_gate_bias  # per head: compressed, selected, window
    return model


def _prepare_folder(config: TrainConfig) -> Path | None:
    """The checkpoint to continue from, None for a new run; ValueError if the folder does not fit the request."""
    last = last_checkpoint(config.out)
    if not config.resume:
        if last is not None or is_trained(config.out):
            raise ValueError(f"{config.out} holds a run already; continue it with --resume or choose another --out")
        return None
    if last is None:
        raise ValueError(f"--resume: there is no checkpoint in {config.out}")
    saved = json.loads((config.out / CONFIG_FILE).read_text())
    if changed := differences(saved, config):
        raise ValueError(f"--resume: the checkpoint in {config.out} has another configuration ({'; '.join(changed)})")
    return last


def _arguments(config: TrainConfig) -> TrainingArguments:
    steps = config.total_steps
    on_cpu = config.device == "cpu" or not torch.cuda.is_available()
    if config.device == "cuda" and on_cpu:
        raise ValueError("--device cuda: torch sees no CUDA device here")
    _quiet_libraries()
    return TrainingArguments(
        output_dir=str(config.out),
        max_steps=steps,
        per_device_train_batch_size=1,  # an item of the dataset is a whole batch
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=config.accumulation,
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
        report_to=["tensorboard"] if config.tensorboard else [],
        disable_tqdm=True,  # nsa.training.metrics.Progress shows one bar instead
        dataloader_num_workers=0,
        dataloader_pin_memory=not on_cpu,
    )


def _quiet_libraries() -> None:
    """Their warnings speak of options that a user of this command cannot set."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(torch|accelerate|transformers)\.")


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
