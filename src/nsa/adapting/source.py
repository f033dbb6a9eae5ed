"""A dense model's configuration: whether it can be made sparse, and what of it."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from nsa.models.families import Family, sparse_class, why_not
from nsa.models.swap import check_config, chosen_layers, sparse_config
from nsa.training.tokenizer import first_line


def read_config(folder: Path) -> Any:
    """The configuration of the model; ValueError in one line where the file is none."""
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # the parser raises errors of every type
        reason = first_line(error)
        if "trust_remote_code" in str(error):
            reason = "it brings Python code of its own, which a row of nsa.models.families cannot know"
        raise ValueError(f"{folder / 'config.json'}: {reason}") from error


def plan(config: Any, method: str, layers: list[int] | None, sizes: dict[str, Any]) -> tuple[Family, Any]:
    """The family and the sparse model's configuration, before any weight is read; ValueError in one line."""
    family = check_config(config, method)
    sparse = chosen_layers(config, layers)
    if reason := why_not(config, sparse):
        raise ValueError(f"{config.model_type}: {reason}")
    return family, sparse_config(config, family, method, sparse, sizes)


def check_room(family: Family, config: Any, dtype: torch.dtype, output: Path) -> None:
    """ValueError where the disk has not as many bytes as the sparse model's weights."""
    with torch.device("meta"):
        model = sparse_class(family, "ForCausalLM")(config)
    needed = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    parent = next(path for path in (output, *output.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(parent).free
    if free < needed * 1.02 + 2**26:
        raise ValueError(f"{output}: the model takes {needed / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB left")
