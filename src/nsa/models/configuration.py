"""Llama's configuration, plus which attention it has and NSA's sizes."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

from nsa.config import NSAConfig

ATTENTIONS = ("nsa", "dense", "window")


@strict
class NSALlamaConfig(LlamaConfig):
    """A Llama whose attention is NSA, or one of its twins that differ in nothing else.

    Args:
        attention: "nsa"; "dense", Llama's own attention; or "window", Llama's own attention over the last
            `nsa["window_size"]` keys only.
        nsa: fields of `nsa.NSAConfig`; those left out have its defaults, unknown ones are an error.
        Everything else is LlamaConfig's.
    """

    model_type = "nsa_llama"

    attention: str = "nsa"
    nsa: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.attention not in ATTENTIONS:
            raise ValueError(f"NSALlamaConfig: attention should be one of {ATTENTIONS}, got {self.attention!r}")
        self.nsa = NSAConfig.from_dict(self.nsa or {}).to_dict()
        super().__post_init__(**kwargs)

    @property
    def nsa_config(self) -> NSAConfig:
        return NSAConfig.from_dict(self.nsa or {})
