"""NSA in Hugging Face: importing this package makes the Auto classes know `nsa_llama`."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from nsa.models.cache import NSALlamaCache
from nsa.models.configuration import NSALlamaConfig
from nsa.models.modeling import NSALlamaForCausalLM, NSALlamaModel

__all__ = ["NSALlamaCache", "NSALlamaConfig", "NSALlamaForCausalLM", "NSALlamaModel"]

AutoConfig.register(NSALlamaConfig.model_type, NSALlamaConfig, exist_ok=True)
AutoModel.register(NSALlamaConfig, NSALlamaModel, exist_ok=True)
AutoModelForCausalLM.register(NSALlamaConfig, NSALlamaForCausalLM, exist_ok=True)
