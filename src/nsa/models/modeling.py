"""Llama with NSA: only what differs from transformers' Llama.

attention="nsa" and "infllm_v2" swap each layer's attention module and the cache. attention="window" keeps Llama's
module and adds a window to its causal mask. attention="dense" is Llama. Weights that Llama has keep their names, so
that a Llama checkpoint loads, with only the new ones reported missing; "infllm_v2" has no new ones.
"""

from typing import Any

import torch
from transformers import LlamaForCausalLM, LlamaModel
from transformers.core_model_loading import WeightRenaming
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

from nsa.models.configuration import SPARSE, NSALlamaConfig
from nsa.models.decoder import SparseDecoder
from nsa.models.language_model import SparseCausalLM
from nsa.models.layers import LAYERS, FusedRMSNorm
from nsa.models.loss import ChunkedLoss
from nsa.models.pretrained import SparsePreTrained

# The gates' map once had the name of the MLP's, and a linear phi was one parameter.
OLD_NAMES = {
    r"self_attn\.gate_proj\.": "self_attn.g_proj.",
    r"compress_k\.weight$": "compress_k.out.weight",
    r"compress_v\.weight$": "compress_v.out.weight",
}


class NSALlamaPreTrainedModel(SparsePreTrained, LlamaPreTrainedModel):
    config: NSALlamaConfig
    config_class = NSALlamaConfig

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """transformers' own; folders that an earlier version wrote load too, and are saved under the new names."""
        loaded = super().from_pretrained(*args, **{"key_mapping": OLD_NAMES, **kwargs})
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        kept = [one for one in getattr(model, "_weight_conversions", None) or () if not isinstance(one, WeightRenaming)]
        model._weight_conversions = kept or None
        return loaded


class NSALlamaModel(SparseDecoder, NSALlamaPreTrainedModel, LlamaModel):
    """The decoder without a head."""

    def __init__(self, config: NSALlamaConfig) -> None:
        config.refuse_ignored()
        super().__init__(config)
        self.nsa_config = config.nsa_config
        sparse = config.sparse_layers
        for layer_idx, layer in enumerate(self.layers):
            if layer_idx in sparse:
                layer.self_attn = LAYERS[config.attention](config, layer_idx, layer.self_attn)
            layer.input_layernorm = FusedRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            layer.post_attention_layernorm = FusedRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.norm = FusedRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_init()


class NSALlamaForCausalLM(SparseCausalLM, NSALlamaPreTrainedModel, LlamaForCausalLM):
    """The language model: save_pretrained, from_pretrained, generate and Trainer as with any Llama."""

    def __init__(self, config: NSALlamaConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)  # what Llama's own does, around another decoder
        self.model = NSALlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.chunked_loss = ChunkedLoss()
        self.post_init()
        if config.attention in SPARSE:
            self._tp_plan.pop("lm_head", None)  # whole on every rank: the loss takes hidden states
