"""Llama's configuration, plus which attention it has and NSA's sizes."""

import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

from nsa.config import InfLLMv2Config, NSAConfig
from nsa.methods.registry import TRAINED
from nsa.models.auto_map import write_auto_map
from nsa.models.peft_targets import tell_peft

ATTENTIONS = tuple(TRAINED)
# Those with layers, caches and positions of this library.
SPARSE = tuple(name for name, method in TRAINED.items() if method.is_sparse)
# What other families change attention with. A configuration takes any key, and this model would ignore these.
FOREIGN = re.compile(
    "sliding|dropout|pdrop|qk_|qkv|softcap|attention|attn|rope|rotary|alibi|sink|multiplier|layer_types"
)


class SparseSizes:
    """What the configurations of all families say of their sparse attention."""

    attention: str
    nsa: dict[str, Any] | None
    infllm_v2: dict[str, Any] | None
    dense_layers: list[int] | None
    num_hidden_layers: int

    def fill_sizes(self) -> None:
        """Sizes that were left out have their defaults; ValueError for unknown ones."""
        self.nsa = NSAConfig.from_dict(self.nsa or {}).to_dict()
        if self.infllm_v2 or self.attention == "infllm_v2":
            self.infllm_v2 = InfLLMv2Config.from_sparse_config(self.infllm_v2 or {}).to_dict()

    @property
    def nsa_config(self) -> NSAConfig:
        """NSA's sizes; for "infllm_v2" those of its blocks in NSA's names, by which caches and layouts go."""
        return self.infllm_v2_config.blocks if self.attention == "infllm_v2" else NSAConfig.from_dict(self.nsa or {})

    @property
    def infllm_v2_config(self) -> InfLLMv2Config:
        return InfLLMv2Config.from_dict(self.infllm_v2 or {})

    @property
    def sparse_layers(self) -> list[int]:
        """Numbers of the layers whose attention is not transformers' own."""
        if self.attention not in SPARSE:
            return []
        dense = set(self.dense_layers or ())
        return [number for number in range(self.num_hidden_layers) if number not in dense]

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """transformers', with the file by which the Auto classes find this one (trust_remote_code=True).

        A model saves its configuration once it knows which files of the folder are old, and pushes the others to a hub.
        """
        write_auto_map(self, Path(save_directory))
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

    def to_dict(self) -> dict[str, Any]:
        """transformers'; PEFT asks for it just before it looks for the model type in its own tables."""
        tell_peft(type(self).model_type)  # type: ignore[attr-defined]
        return super().to_dict()  # type: ignore[misc]

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: transformers would copy this library's source into every folder."""


@strict
class NSALlamaConfig(SparseSizes, LlamaConfig):
    """A Llama whose attention is NSA, or one of its twins that differ in nothing else.

    Args:
        attention: "nsa"; "infllm_v2", which has Llama's parameters and no others; "dense", Llama's own attention; or
            "window", Llama's own attention over the last `nsa["window_size"]` keys only.
        nsa: fields of `nsa.NSAConfig`; those left out have its defaults, unknown ones are an error.
        infllm_v2: fields of `nsa.config.InfLLMv2Config`, that is of MiniCPM4's `sparse_config`; in the same way.
        dense_layers: numbers of the layers that keep Llama's own attention beside those with NSA; by default none.
        Everything else is LlamaConfig's.

    Raises:
        ValueError: an unknown attention or field of nsa; an option that the model would ignore: another family's way
            to change attention (sliding_window, use_qk_norm); attention_dropout but for "dense"; output_attentions
            but for "dense" with attn_implementation="eager", which alone has weights to return.
    """

    model_type = "nsa_llama"

    attention: str = "nsa"
    nsa: dict[str, Any] | None = None
    infllm_v2: dict[str, Any] | None = None
    dense_layers: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.attention not in ATTENTIONS:
            raise ValueError(f"NSALlamaConfig: attention should be one of {ATTENTIONS}, got {self.attention!r}")
        self.fill_sizes()
        super().__post_init__(**kwargs)
        check_dense_layers(self)
        self.base_model_tp_plan = tp_plan(self)
        self.refuse_ignored()

    def refuse_ignored(self) -> None:
        """ValueError where an option is set that the model would ignore; its constructor asks again."""
        known = type(self).__dataclass_fields__
        foreign = [
            key
            for key, value in vars(self).items()
            if value and not key.startswith("_") and key not in known and FOREIGN.search(key)
        ]
        if foreign:
            options = ", ".join(f"{key}={getattr(self, key)!r}" for key in foreign)
            raise ValueError(f"NSALlamaConfig: this model would ignore {options}; expected no such option")
        if self.attention != "dense" and self.attention_dropout:
            raise ValueError(
                f"NSALlamaConfig: attention={self.attention!r} has no dropout; expected attention_dropout=0, "
                f"got {self.attention_dropout}"
            )
        self.refuse_attentions(self.output_attentions)

    def refuse_attentions(self, asked: bool | None) -> None:
        """ValueError where attention weights are asked for that are never computed."""
        if asked and (self.attention, self._attn_implementation) != ("dense", "eager"):
            raise ValueError(
                "output_attentions=True: expected attention='dense' with attn_implementation='eager', the only one "
                f"that has weights to return; got {self.attention!r} with {self._attn_implementation!r}"
            )


def check_dense_layers(config: Any) -> None:
    """ValueError where `dense_layers` are not layers of the model, or all of them, or not beside NSA."""
    given, layers = config.dense_layers or [], config.num_hidden_layers
    if given and config.attention not in SPARSE:
        raise ValueError(f"dense_layers: expected none with attention={config.attention!r}, got {given}")
    if given and (len(set(given)) < len(given) or not set(given) < set(range(layers))):
        raise ValueError(
            f"dense_layers: expected some of the layers 0 to {layers - 1}, each once and not all, got {given}"
        )


def tp_plan(config: Any) -> dict[str, str] | None:
    """The family's plan of tensor parallelism, and NSA's own projections, cut by KV heads like the others."""
    family = type(config).base_model_tp_plan
    if family is None or config.attention != "nsa":
        return family  # InfLLM-V2 has no projections but the family's, and chooses for each KV head by itself
    own = ("g_proj",) if config.nsa["shared_kv"] else ("g_proj", "k_proj_cmp", "v_proj_cmp", "k_proj_win", "v_proj_win")
    return {**family, **{f"layers.*.self_attn.{name}": "colwise" for name in own}}
