"""The model for vLLM: its own Llama around the methods' attention; also of other families whose decoder is Llama's.

The dense and the window twin are vLLM's Llama with its own attention.
"""

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.models import llama
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, extract_layer_index

from nsa.models.configuration import SPARSE
from nsa.serving.vllm_attention import attention_of


class SparseDecoderLayer(llama.LlamaDecoderLayer):
    def __init__(self, vllm_config: VllmConfig, prefix: str = "", config: Any = None) -> None:
        config = config or vllm_config.model_config.hf_config
        attention = attention_of(config, extract_layer_index(prefix))
        super().__init__(vllm_config, prefix, config, attn_layer_type=attention)


class SparseForCausalLM(llama.LlamaForCausalLM):
    """For `ModelRegistry`; vLLM's decoder, head and logits."""

    packed_modules_mapping: ClassVar = {"gate_up_proj": ["gate_proj", "up_proj"]}

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        compilation = vllm_config.compilation_config
        if compilation.splitting_ops and "nsa::serving_attention" not in compilation.splitting_ops:
            compilation.splitting_ops.append("nsa::serving_attention")  # what reads the host is in no graph
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=SparseDecoderLayer)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        if self.config.attention not in SPARSE:
            return super().load_weights(weights)
        # Not by way of the decoder's own loader, which puts q, k and v into one.
        loader = AutoWeightsLoader(_Parts(self))
        return loader.load_weights(weights, mapper=WEIGHTS)


class _Parts(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.lm_head = nn.Module(), model.lm_head
        for name, part in model.model.named_children():
            self.model.add_module(name, part)


WEIGHTS = WeightsMapper(
    orig_to_new_substr={"self_attn.gate_proj": "self_attn.g_proj"},  # what an earlier version wrote
    orig_to_new_stacked={".mlp.gate_proj": (".mlp.gate_up_proj", 0), ".mlp.up_proj": (".mlp.gate_up_proj", 1)},
)
