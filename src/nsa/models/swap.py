"""A loaded dense model with a sparse method in the place of its attention: `swap_attention`."""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from nsa.config import GATE_BIAS, InfLLMv2Config, NSAConfig
from nsa.models.auto_map import AUTO
from nsa.models.configuration import SPARSE
from nsa.models.families import FAMILIES, Family, own_rotary, sparse_class, why_not, window_of
from nsa.models.family_attention import FUSED, split_fused, start
from nsa.modules.attention import NativeSparseAttention

Layers = Sequence[int] | Mapping[str, Sequence[int]] | None
# What every configuration of transformers has and says nothing of the model.
NOT_KEPT = ("model_type", "architectures", "auto_map", "transformers_version", "attention", *SPARSE, "dense_layers")


def swap_attention(
    model: nn.Module,
    method: str = "nsa",
    *,
    layers: Layers = None,
    nsa: NSAConfig | Mapping[str, Any] | None = None,
    infllm_v2: InfLLMv2Config | Mapping[str, Any] | None = None,
    gate_bias: float = GATE_BIAS,
) -> Any:
    """The model with another method in place of its own attention, which computes nearly the same.

    The new model is of the family's class with NSA (`nsa.models.families`) and shares every weight that the dense one
    has: what is trained or loaded in one is so in both. New are each layer's gates, phi, and, unless `nsa.shared_kv`,
    keys and values of compression and window, which begin as copies. Where every block fits (lengths up to
    num_selected_blocks * select_block_size) the selected branch is the dense attention, and the model differs by what
    the gates let through of the two others: each with a weight of sigmoid(-gate_bias), .25% by default.

    Args:
        model: a model of transformers, for language or classification, of a family in `FAMILIES`, or the dense twin.
        method: "nsa" or "infllm_v2".
        layers: numbers of those that become sparse, or {"dense": numbers of those that do not}; by default all whose
            attention is not restricted to a window.
        nsa, infllm_v2: sizes of the method, or some of their fields; by default its paper's, and for a dense twin
            those of its configuration.
        gate_bias: where the gates start. Far from 0 they are shut, and with large values (30) the function is kept to
            rounding where every block fits, but gates that are shut do not learn.

    Raises:
        ValueError: no row for the model's type, a class that has none with NSA, attention that NSA cannot keep
            (dropout, softcapping, windows in the layers named, rotations that change with the length), quantized
            weights, adapters, weights on several devices, a model with NSA already; each in one line.
    """
    config: Any = model.config
    family = check_config(config, method)
    check_gate_bias(gate_bias)
    sparse = chosen_layers(config, layers)
    if reason := why_not(config, sparse):
        raise ValueError(f"swap_attention: {config.model_type}: {reason}")
    what = next((name for name in AUTO if type(model) in (family.theirs(name), sparse_class(family, name))), None)
    if what is None:
        raise ValueError(
            f"swap_attention: expected one of transformers' {family.name} models, got {type(model).__name__}"
        )
    _check_weights(model)
    given, other = (nsa, infllm_v2) if method == "nsa" else (infllm_v2, nsa)
    if other is not None:
        raise ValueError(f"swap_attention: sizes of another method than {method!r} were given: {other}")
    if isinstance(given, NSAConfig | InfLLMv2Config):
        sizes = given.to_dict()
    else:
        sizes = {**(getattr(config, method, None) or {}), **(given or {})}
    new_config = sparse_config(config, family, method, sparse, sizes)
    with torch.device("meta"):  # no memory: weights are those of the dense model, or what `start` gives
        new = sparse_class(family, what)(new_config)
    _share(model, new)
    for module in new.modules():
        if isinstance(module, NativeSparseAttention):
            start(module, gate_bias)
    new.train(model.training)
    new.generation_config = copy.deepcopy(getattr(model, "generation_config", None))
    return new


def check_config(config: Any, method: str = "nsa") -> Family:
    """The family of a dense configuration; ValueError in one line where it has none, or NSA already."""
    if method not in SPARSE:
        raise ValueError(f"swap_attention: method should be one of {', '.join(SPARSE)}, got {method!r}")
    kind = config.model_type
    if getattr(config, "attention", "dense") != "dense" or getattr(config, "dense_layers", None):
        raise ValueError(f"swap_attention: the model has attention={config.attention!r} already; expected a dense one")
    family = FAMILIES.get(kind.removeprefix("nsa_"))
    if family is None:
        inner = getattr(getattr(config, "text_config", None), "model_type", None)
        hint = f"; its text part is {inner!r}, give that alone" if inner in FAMILIES else ""
        raise ValueError(
            f"swap_attention: no row for model type {kind!r} in nsa.models.families.FAMILIES, which has "
            f"{', '.join(FAMILIES)}{hint}; docs/convert.md says how to add one"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("swap_attention: the weights are quantized; expected those that they were made from")
    return family


def check_gate_bias(gate_bias: float) -> None:
    """ValueError where gates of this bias could never learn, or are none."""
    if not math.isfinite(gate_bias):
        raise ValueError(f"gate_bias: expected a finite number, got {gate_bias}")


def chosen_layers(config: Any, layers: Layers = None) -> list[int]:
    """Numbers of the layers that become sparse; ValueError where there are no such layers."""
    count = config.num_hidden_layers
    named: Any = layers or ()
    if isinstance(layers, Mapping):
        if set(layers) != {"dense"}:
            raise ValueError(f"layers: expected numbers, or {{'dense': numbers}}, got {dict(layers)}")
        named = layers["dense"]
    stays_dense = set(named) if isinstance(layers, Mapping) else set()
    if not set(named) <= set(range(count)) or layers == [] or len(stays_dense) == count:
        raise ValueError(f"layers: expected some of 0 to {count - 1}, got {layers}")
    if named and not stays_dense:
        return sorted(set(named))
    rest = [number for number in range(count) if number not in stays_dense]
    free = [number for number in rest if window_of(config, number) is None]
    return free or rest  # where there is none, `why_not` says so


def sparse_config(config: Any, family: Family, method: str, sparse: list[int], sizes: Mapping[str, Any]) -> Any:
    """The family's configuration with NSA in the layers `sparse`."""
    values = {name: value for name, value in config.to_dict().items() if name not in NOT_KEPT}
    numbers = range(config.num_hidden_layers)
    if "sliding_window" in values and all(window_of(config, number) is None for number in numbers):
        values["sliding_window"] = None  # one that no position reaches
    dense = [number for number in numbers if number not in sparse]
    made = sparse_class(family, "Config")(
        **values, attention=method, dense_layers=dense or None, **{method: dict(sizes)}
    )
    made._name_or_path = config._name_or_path
    if dense:
        made._attn_implementation = config._attn_implementation
    return made


def _check_weights(model: nn.Module) -> None:
    """ValueError where the weights are not tensors of one device under transformers' own names."""
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
        raise ValueError("swap_attention: the weights are quantized; expected those that they were made from")
    if getattr(model, "peft_config", None) is not None:
        raise ValueError("swap_attention: the model has adapters; merge them first (merge_and_unload)")
    places = {str(parameter.device) for parameter in model.parameters()}
    if len(places) > 1:
        raise ValueError(f"swap_attention: expected all weights on one device, got {', '.join(sorted(places))}")


def _share(dense: nn.Module, new: nn.Module) -> None:
    """Every parameter and buffer of `dense` into its place in `new`."""
    places = dict(new.named_modules())
    for name, parameter in dense.named_parameters(remove_duplicate=False):
        parent, _, leaf = name.rpartition(".")
        above, _, last = parent.rpartition(".")
        if parent in places and leaf in places[parent]._parameters:
            places[parent]._parameters[leaf] = parameter
        elif last == "qkv_proj" and f"{above}.{FUSED[0]}" in places:
            for part, rows in split_fused(parameter.detach(), dense.get_submodule(above)).items():
                places[f"{above}.{part}"]._parameters[leaf] = nn.Parameter(rows, parameter.requires_grad)
        else:
            raise ValueError(f"swap_attention: the weight {name} has no place in {type(new).__name__}")
    for name, buffer in dense.named_buffers(remove_duplicate=False):
        parent, _, leaf = name.rpartition(".")
        if parent in places and leaf in places[parent]._buffers:
            places[parent]._buffers[leaf] = buffer
    decoder: Any = getattr(new, "model", new)
    for number in decoder.config.sparse_layers:
        decoder.layers[number].self_attn.rotary = own_rotary(decoder)
