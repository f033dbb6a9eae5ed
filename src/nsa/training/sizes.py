"""The sizes of a model, from those of a training configuration: the one place where the two meet."""

from pathlib import Path
from typing import Any

from nsa.models import NSALlamaConfig
from nsa.training.config import TrainConfig
from nsa.training.tokenizer import BYTES_VOCABULARY, load_tokenizer


def model_config(config: TrainConfig, vocab_size: int | None = None, **values: Any) -> NSALlamaConfig:
    """The configuration of the model that `config` trains.

    Args:
        config: sizes and kind of attention.
        vocab_size: tokens of the tokenizer; None: as many as `config` asks for.
        values: fields of NSALlamaConfig to have otherwise, such as the ids of special tokens.
    """
    attention = values.get("attention", config.attention)
    chosen: dict[str, Any] = {
        "attention": attention,
        "nsa": config.nsa.to_dict(),
        "infllm_v2": config.infllm_v2.to_dict() if attention == "infllm_v2" else None,
        "dense_layers": list(config.dense_layers) or None,
        "vocab_size": vocabulary(config) if vocab_size is None else vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.context,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_embeddings,
    }
    return NSALlamaConfig(**chosen | values)


def vocabulary(config: TrainConfig) -> int:
    """Tokens of the tokenizer that `config` names; of a bpe, as many as it may get."""
    if config.tokenizer == "bytes":
        return BYTES_VOCABULARY
    return config.vocab_size if config.tokenizer == "bpe" else len(load_tokenizer(str(Path(config.tokenizer))))
