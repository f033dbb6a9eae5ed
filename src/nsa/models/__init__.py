"""NSA in Hugging Face: importing this package makes the Auto classes know Llama with NSA, and the other families."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import nsa.models.families  # noqa: F401  (registers the families)
from nsa.models.cache import NSALlamaCache
from nsa.models.configuration import NSALlamaConfig
from nsa.models.modeling import NSALlamaForCausalLM, NSALlamaModel
from nsa.models.swap import swap_attention

__all__ = ["NSALlamaCache", "NSALlamaConfig", "NSALlamaForCausalLM", "NSALlamaModel", "swap_attention"]

AutoConfig.register(NSALlamaConfig.model_type, NSALlamaConfig, exist_ok=True)
AutoModel.register(NSALlamaConfig, NSALlamaModel, exist_ok=True)
AutoModelForCausalLM.register(NSALlamaConfig, NSALlamaForCausalLM, exist_ok=True)
