"""What transformers asks of a model class: which attention it runs, how it is saved, loaded, initialised and cut."""

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers import initialization as init
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from nsa.distributed.tensor import check_heads, share_phi
from nsa.methods.registry import TRAINED
from nsa.models.configuration import SPARSE
from nsa.models.twins import attend_dense, attend_window, dense_mask, window_mask
from nsa.modules.compression import Compression
from nsa.modules.projections import StartingLinear

# What a mixin stands before: a class of transformers.
Transformers: Any = object

# NSA's module never calls the attention function registered beside it; no mask is made for it.
AttentionInterface.register("nsa", sdpa_attention_forward)
AttentionMaskInterface.register("nsa_dense", dense_mask)
AttentionInterface.register("nsa_dense", attend_dense)
AttentionMaskInterface.register("nsa_window", window_mask)
AttentionInterface.register("nsa_window", attend_window)


class SomeLayersDense:
    """A flag of a model class: true where transformers may replace the attention of all layers (dense) or some."""

    def __get__(self, model: Any, owner: type) -> bool:
        return model is not None and (model.config.attention == "dense" or bool(model.config.dense_layers))


class SparsePreTrained(Transformers):
    """What a model class of transformers needs to hold NSA's layers; a mixin that stands before that class."""

    _can_compile_fullgraph = False
    _supports_attention_backend = SomeLayersDense()
    _supports_flash_attn = SomeLayersDense()
    _supports_flex_attn = SomeLayersDense()
    _supports_sdpa = SomeLayersDense()

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        """The configuration's `attention` decides; the dense twin takes any of transformers' that is asked for."""
        attention, own = self.config.attention, TRAINED[self.config.attention].implementation
        of_others = {method.implementation for name, method in TRAINED.items() if name != "dense"}
        if self.config.dense_layers and attn_implementation not in of_others:
            if self.config.model_type == "nsa_llama":  # a family's own layers may do more than the twin
                attn_implementation = attn_implementation or TRAINED["dense"].implementation
            return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)
        if attention == "dense" and attn_implementation not in of_others:
            return super()._check_and_adjust_attn_implementation(attn_implementation or own, *args, **kwargs)
        if attention == "dense" or attn_implementation not in (None, own):
            raise ValueError(
                f"attention={attention!r} has its own implementation: expected attn_implementation=None, "
                f"got {attn_implementation!r}"
            )
        return own

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing: transformers would copy this library's source into every folder."""

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, device_mesh: Any) -> Any:
        """transformers', where there is a plan; phi's gradient is then that of the heads of all ranks."""
        tp_plan, ranks = getattr(distributed_config, "tp_plan", None), getattr(distributed_config, "tp_size", None) or 1
        config = model.config
        if tp_plan is not None and config.attention in SPARSE and config.base_model_tp_plan is None:
            raise ValueError(
                f"tp_plan={tp_plan!r}: attention={config.attention!r} of {type(config).__name__} has no "
                "tensor-parallel plan yet; expected None"
            )
        if ranks > 1:
            check_heads(ranks, config.num_key_value_heads)
        model = super().maybe_distribute_model(model, distributed_config, device_mesh)
        if ranks > 1:
            share_phi(model, device_mesh["tp"] if device_mesh.ndim > 1 else device_mesh)
        return model

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Llama's, and what phi and the gates begin with, but for weights that were loaded (transformers' `init`)."""
        super()._init_weights(module)
        if isinstance(module, Compression):
            module.reset_position_encoding(self.config.initializer_range)
        elif isinstance(module, StartingLinear):
            module.reset_parameters(init.copy_)
