"""Presets: functions that return a whole configuration. A flag of the command line changes a single value."""

from collections.abc import Callable

from nsa.config import InfLLMv2Config, NSAConfig
from nsa.training.config import TrainConfig


def demo() -> TrainConfig:
    """One CPU core, about five minutes for NSA: recall far beyond the window, learned from nothing.

    Short rows of repeated words first, for there a model learns to copy (previous-token head and matching head);
    then many constants and their uses, and rows that grow to eight times the window. The three branches share their
    keys and values, so that a match learned in one serves all: with so little training each would not learn it by
    itself. docs/log.md tells what failed.
    """
    return TrainConfig(
        preset="demo",
        max_bytes=4_000_000,
        curriculum=(
            "32x280:repeated=0.5:retrieval=0.4:keys=1",
            "64x200:repeated=0.4:retrieval=0.5:keys=1",
            "128x150:retrieval=0.8",
            "256x100:retrieval=0.8",
            "512x360:retrieval=0.7",
        ),
        batch_tokens=2048,
        hidden_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        intermediate_size=256,
        initializer_range=0.05,
        nsa=NSAConfig(
            compress_block_size=8,
            compress_stride=4,
            select_block_size=16,
            num_selected_blocks=8,
            window_size=64,
            shared_kv=True,
        ),
        infllm_v2=InfLLMv2Config(kernel_size=8, kernel_stride=4, block_size=16, window_size=64, topk=8, dense_len=0),
        answer_weight=3.0,
        compressed_gate_bias=-2.0,
        learning_rate=2e-3,
        beta2=0.99,
        eval_every=545,
        eval_tokens=8192,
        save_every=200,
        log_every=20,
    )


def small() -> TrainConfig:
    """About 25M parameters at a context of 4096: under an hour on one GPU."""
    return TrainConfig(
        preset="small",
        max_bytes=300_000_000,
        tokenizer="bpe",
        curriculum=("512x2000:retrieval=0.2", "2048x4000:retrieval=0.1", "4096x4000:retrieval=0.1"),
        layout="flat",
        batch_tokens=32768,
        accumulation=2,
        hidden_size=512,
        num_layers=8,
        num_heads=8,
        num_kv_heads=2,
        intermediate_size=1376,
        nsa=NSAConfig(
            compress_block_size=16,
            compress_stride=8,
            select_block_size=32,
            num_selected_blocks=16,
            window_size=256,
        ),
        infllm_v2=InfLLMv2Config(kernel_size=16, kernel_stride=8, block_size=32, window_size=256, topk=16, dense_len=0),
        selector_loss=0.5,
        learning_rate=1e-3,
        warmup_steps=200,
        dtype="bfloat16",
        eval_every=500,
        eval_tokens=262144,
        save_every=500,
        log_every=20,
    )


def one_billion() -> TrainConfig:
    """About 1B parameters with the paper's block sizes at a context of 8192, for GPUs: bring a token file."""
    return TrainConfig(
        preset="1b",
        max_bytes=10_000_000_000,
        tokenizer="bpe",
        vocab_size=32768,
        curriculum=("4096x20000:retrieval=0.02", "8192x20000:retrieval=0.02"),
        layout="flat",
        batch_tokens=32768,
        accumulation=16,
        hidden_size=2048,
        num_layers=20,
        num_heads=32,
        num_kv_heads=2,
        intermediate_size=5632,
        rope_theta=500000.0,
        nsa=NSAConfig(),
        learning_rate=4e-4,
        warmup_steps=1000,
        gradient_checkpointing=True,
        dtype="bfloat16",
        eval_every=1000,
        eval_tokens=1048576,
        save_every=1000,
        log_every=10,
    )


PRESETS: dict[str, Callable[[], TrainConfig]] = {"demo": demo, "small": small, "1b": one_billion}


def preset(name: str) -> TrainConfig:
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; expected one of {', '.join(PRESETS)}")
    return PRESETS[name]()
