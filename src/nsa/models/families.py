"""Families of decoders with NSA: a row of the table names transformers' classes, and what differs follows from them.

Of a row `Family("Qwen3", "qwen3")` come NSAQwen3Config, NSAQwen3Model, NSAQwen3ForCausalLM and those with a head for
classification, known to the Auto classes as "nsa_qwen3": transformers' own, whose attention is `FamilyAttention` in the
layers that are not `dense_layers`. Llama's are older and stand in `nsa.models.modeling`.

A family has a row if its layers have `self_attn` with q_proj, k_proj, v_proj (or qkv_proj) and o_proj, `scaling` and
`head_dim`, norms of queries and keys, if any, over a head (`q_norm`, `k_norm`), and Llama's rotation.
"""

import copy
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig

from nsa.methods.registry import trained
from nsa.models.auto_map import AUTO
from nsa.models.configuration import SPARSE, NSALlamaConfig, SparseSizes, check_dense_layers
from nsa.models.decoder import SparseDecoder
from nsa.models.family_attention import LAYERS
from nsa.models.language_model import SparseCausalLM
from nsa.models.loss import ChunkedLoss
from nsa.models.modeling import NSALlamaForCausalLM, NSALlamaModel, NSALlamaPreTrainedModel
from nsa.models.pretrained import SparsePreTrained
from nsa.modules.rotary import Rotary


@dataclass(frozen=True)
class Family:
    """A family of transformers.

    name: what its classes begin with.
    module: of transformers.models.
    model_type: of its configuration.
    text: what stands in the names of configuration and decoder, where the family has others beside those of text.
    """

    name: str
    module: str
    model_type: str
    text: str = ""

    def theirs(self, what: str) -> Any:
        """transformers' class of this family: Config, Model, ForCausalLM, ForSequenceClassification, ..."""
        kind = "configuration" if what == "Config" else "modeling"
        names = import_module(f"transformers.models.{self.module}.{kind}_{self.module}")
        return getattr(names, f"{self.name}{self.text if what != 'ForCausalLM' else ''}{what}", None)


FAMILIES = {
    family.model_type: family
    for family in (
        Family("Llama", "llama", "llama"),
        Family("Mistral", "mistral", "mistral"),
        Family("Qwen2", "qwen2", "qwen2"),
        Family("Qwen3", "qwen3", "qwen3"),
        Family("Phi3", "phi3", "phi3"),
        Family("Gemma2", "gemma2", "gemma2"),
        Family("Gemma3", "gemma3", "gemma3_text", text="Text"),
    )
}


class SparseOptions(SparseSizes):
    """What a family's configuration has beside transformers' fields.

    attention: the method, "nsa" or "infllm_v2".
    nsa: fields of `nsa.NSAConfig`; those left out have its defaults, unknown ones are an error.
    infllm_v2: fields of `nsa.config.InfLLMv2Config`, in the same way.
    dense_layers: numbers of the layers that keep the family's own attention; by default none.
    """

    attention: str
    nsa: dict[str, Any] | None
    infllm_v2: dict[str, Any] | None
    dense_layers: list[int] | None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.attention not in SPARSE:
            raise ValueError(f"{type(self).__name__}: attention should be one of {SPARSE}, got {self.attention!r}")
        self.fill_sizes()
        super().__post_init__(**kwargs)  # type: ignore[misc]
        self.base_model_tp_plan = None  # the family's does not know of NSA's projections
        check_dense_layers(self)
        self.refuse_ignored()

    def refuse_ignored(self) -> None:
        """ValueError where an option is set that NSA would ignore; the model's constructor asks again."""
        if reason := why_not(self, self.sparse_layers):
            raise ValueError(f"{type(self).__name__}: {reason}")

    def refuse_attentions(self, asked: bool | None) -> None:
        """ValueError where attention weights are asked for, which NSA never computes."""
        if asked:
            raise ValueError(f"output_attentions=True: attention={self.attention!r} has no weights to return")


def why_not(config: Any, layers: list[int]) -> str | None:
    """What of a family's attention NSA cannot keep in these layers, in words; None where it keeps all."""
    if getattr(config, "attention_dropout", 0):
        return f"NSA has no dropout; expected attention_dropout=0, got {config.attention_dropout}"
    if getattr(config, "attn_logit_softcapping", None):
        return f"NSA has no softcapping of scores; expected none, got {config.attn_logit_softcapping}"
    if getattr(config, "use_bidirectional_attention", False):
        return "NSA is causal; expected use_bidirectional_attention=False, got True"
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        return "NSA has no cross-attention; expected a decoder alone"
    windows = [number for number in layers if window_of(config, number) is not None]
    if windows:
        full = [number for number in range(config.num_hidden_layers) if window_of(config, number) is None]
        rest = f"only layers {full} can be" if full else "so no layer can be"
        return f"layers {windows} attend within a window of {window_of(config, windows[0])} tokens; {rest} sparse"
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    if rope.get("rope_type", "default") not in ("default", "linear", "llama3", "yarn"):
        return (
            f"rotary embeddings of type {rope['rope_type']!r} change with the length; expected linear, llama3 or yarn"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return f"NSA rotates whole heads; expected partial_rotary_factor=1, got {rope['partial_rotary_factor']}"
    return None


def window_of(config: Any, number: int) -> int | None:
    """Tokens that a layer's dense attention is restricted to; None where it sees all."""
    kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    is_full = kinds is not None and kinds[number] == "full_attention"
    return None if is_full or window is None or window >= config.max_position_embeddings else window


class FamilyDecoder(SparseDecoder):
    """Transformers' decoder, whose attention is swapped when it is made."""

    def __init__(self, config: Any) -> None:
        config.refuse_ignored()
        super().__init__(config)
        swap_layers(self, config)
        self.post_init()

    @property
    def rotary(self) -> Rotary:
        return rotary_of_full(self.rotary_emb)


class FamilyCausalLM(SparseCausalLM):
    """Transformers' language model around another decoder."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = decoder_of(config)(config)
        self.chunked_loss = ChunkedLoss()
        self.post_init()
        self._tp_plan: dict[str, str] = {}


class FamilyHead:
    """Transformers' model with a head around another decoder."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.model = decoder_of(config)(config)
        self.post_init()  # type: ignore[attr-defined]


class FullRotary(nn.Module):
    """The rotary embedding of the layers with full attention, where those of the others differ."""

    def __init__(self, every: nn.Module) -> None:
        super().__init__()
        self.every = every

    def forward(self, x: Any, positions: Any) -> Any:
        return self.every(x, positions, layer_type="full_attention")


def rotary_of_full(rotary: Any) -> Any:
    """A family's rotary embedding as NSA calls it, with (x, positions).

    Where layers differ (Gemma 3), `rope_type` is a dictionary by their kind, and the embedding wants the kind named.
    """
    return rotary if isinstance(rotary.rope_type, str) else partial(rotary, layer_type="full_attention")


def swap_layers(decoder: Any, config: Any) -> None:
    """Put a layer of the method where a decoder of transformers has the attention of the sparse layers."""
    decoder.nsa_config = config.nsa_config
    for number in config.sparse_layers:
        layer = decoder.layers[number]
        given = (layer.self_attn, own_rotary(decoder), number)
        layer.self_attn = LAYERS[config.attention](trained(config).sizes_of(config), *given)


def own_rotary(decoder: Any) -> nn.Module:
    """A decoder's rotary embedding for a layer by itself."""
    rotary = copy.deepcopy(decoder.rotary_emb)
    return rotary if isinstance(rotary.rope_type, str) else FullRotary(rotary)


def sparse_class(family: Family, what: str) -> Any:
    """The class with NSA of `family.theirs(what)`; None where transformers has none."""
    if family.model_type == "llama" and what in LLAMA:
        return LLAMA[what]
    return globals().get(f"NSA{family.name}{what}")


def decoder_of(config: Any) -> Any:
    return sparse_class(FAMILIES[config.model_type.removeprefix("nsa_")], "Model")


LLAMA = {"Config": NSALlamaConfig, "Model": NSALlamaModel, "ForCausalLM": NSALlamaForCausalLM}


def _make(family: Family) -> None:
    """The classes of a row, as names of this module, and known to the Auto classes."""
    if family.model_type != "llama":
        options = {"attention": "nsa", "nsa": None, "infllm_v2": None, "dense_layers": None}
        made = type(
            f"NSA{family.name}Config",
            (SparseOptions, family.theirs("Config")),
            {
                "__module__": __name__,
                "__doc__": f"{family.theirs('Config').__name__} with NSA: `SparseOptions` beside its fields.",
                "__annotations__": {name: SparseOptions.__annotations__[name] for name in options},
                "model_type": f"nsa_{family.model_type}",
                "has_no_defaults_at_init": True,  # some families' own defaults are such that NSA refuses
                **options,
            },
        )
        globals()[made.__name__] = strict(made)
        AutoConfig.register(made.model_type, made, exist_ok=True)  # type: ignore[attr-defined]
    config = sparse_class(family, "Config")
    mixins = {"Model": FamilyDecoder, "ForCausalLM": FamilyCausalLM}
    for what, auto in AUTO.items():
        theirs = family.theirs(what)
        if theirs is None:
            continue
        if sparse_class(family, what) is None:
            values = {"__module__": __name__, "__doc__": f"{theirs.__name__} with NSA.", "config_class": config}
            values["__annotations__"] = {"config": config}
            before = NSALlamaPreTrainedModel if family.model_type == "llama" else SparsePreTrained
            name = f"NSA{family.name}{what}"
            globals()[name] = type(name, (mixins.get(what, FamilyHead), before, theirs), values)
        auto.register(config, sparse_class(family, what), exist_ok=True)


for _family in FAMILIES.values():
    _make(_family)
