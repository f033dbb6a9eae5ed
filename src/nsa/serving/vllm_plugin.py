"""What vLLM calls in each of its processes, by the entry point `vllm.general_plugins`: it makes NSA models known."""

import logging

from nsa.serving.vllm_version import why_not

ARCHITECTURES = ("NSALlamaForCausalLM", "NSAMistralForCausalLM", "NSAQwen2ForCausalLM", "NSAQwen3ForCausalLM")


def register() -> None:
    """Register configuration and model; with another vLLM say so in one line, and leave its other models alone."""
    import vllm

    if (reason := why_not(vllm.__version__)) is not None:
        logging.getLogger("vllm.nsa").warning("%s; NSA models are not registered", reason)
        return
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    import nsa.models  # noqa: F401 which tells AutoConfig
    from nsa.serving.vllm_config import NSAModelConfig

    for name in ARCHITECTURES:
        ModelRegistry.register_model(name, "nsa.serving.vllm_model:SparseForCausalLM")
        MODELS_CONFIG_MAP[name] = NSAModelConfig
