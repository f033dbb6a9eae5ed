"""From folders on the command line to models ready to be judged."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nsa.out_of_memory import is_out_of_memory


@dataclass(frozen=True)
class Candidate:
    """A model under judgement: its folder, the name it has in tables, and what it is."""

    name: str
    folder: Path
    model: nn.Module
    tokenizer: Any
    by_mass: bool = False
    """Whether blocks are chosen by their exact attention mass, in place of the model's own selection."""

    @property
    def attention(self) -> str:
        """ "nsa", "infllm_v2", "dense" or "window" for a twin of this library; the model type for any other model."""
        return str(getattr(self.config, "attention", None) or self.config.model_type)

    @property
    def config(self) -> Any:
        """Of the language model, where it is a part of one that does more."""
        config: Any = self.model.config
        return config.get_text_config() if hasattr(config, "get_text_config") else config

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def describe(self) -> dict[str, Any]:
        """What a result file says about the model."""
        config = self.config
        return {
            "name": self.name,
            "folder": str(self.folder),
            "attention": self.attention,
            "num_parameters": self.num_parameters,
            "num_layers": config.num_hidden_layers,
            "max_positions": getattr(config, "max_position_embeddings", None),
            "vocab_size": config.vocab_size,
            "nsa": dict(getattr(config, self.attention, None) or getattr(config, "nsa", None) or {}),
            "dense_layers": list(getattr(config, "dense_layers", None) or ()),
            "by_mass": self.by_mass,
        }


def check_folder(folder: Path) -> None:
    """One clear line for a path that cannot be a model; reads nothing but the folder's listing."""
    if not folder.exists():
        raise ValueError(f"no such folder: {folder} (expected a model saved by `nsa train` or save_pretrained)")
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; expected the folder of a model")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no model: it has no config.json (saved by `nsa train` or save_pretrained)")


def load(
    folder: Path, *, name: str, device: str = "cpu", dtype: str = "float32", trust_remote_code: bool = False
) -> Candidate:
    """Load a saved causal language model and its tokenizer, ready to be judged (eval mode, no gradients).

    Python code that the folder brings runs only if it is trusted, and nothing is downloaded.

    Raises:
        ValueError: whatever makes the folder no such model, in one line.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    import nsa.models  # noqa: F401  (registers nsa_llama with the Auto classes)

    check_folder(folder)
    place = device_of(device)
    logging.disable_progress_bar()  # loading a shard is no news among the progress of the tasks
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what does not fit is our error below, in one line
    shared: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(folder, **shared)
        if not trust_remote_code:
            check_size(folder, config)
        tokenizer = AutoTokenizer.from_pretrained(folder, **shared)
        tokenizer.encode("a")  # values of wrong types are met only here
        found: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), output_loading_info=True, ignore_mismatched_sizes=True, **shared
        )
    except Exception as error:  # the parsers of these files raise errors of every type
        if isinstance(error, ImportError) or is_out_of_memory(error):
            raise  # the machine's fault, not the files'
        reason = " ".join(str(error).split()) or type(error).__name__
        if "trust_remote_code" in reason:
            reason = "it brings Python code of its own, which runs only with --trust-remote-code"
        raise ValueError(f"{folder} could not be loaded as a causal language model: {reason[:200]}") from error
    finally:
        logging.set_verbosity(verbosity)
    model, loaded = found
    missing, misshapen = loaded["missing_keys"], loaded["mismatched_keys"]
    unused = [key for key in loaded["unexpected_keys"] if _would_belong(key, model)]
    if missing or misshapen or unused:
        counts = f"{len(missing)} missing, {len(misshapen)} of another shape, {len(unused)} without a place"
        raise ValueError(f"{folder}: the weights do not fit config.json: {counts}")
    return Candidate(name, folder, model.to(place).eval().requires_grad_(False), tokenizer)


def check_size(folder: Path, config: Any) -> None:
    """ValueError before memory is taken for a model that the folder's weights are nowhere near large enough for."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    asked = sum(p.numel() for p in model.parameters())
    held = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    if asked > 16 * held:  # half a bit for each
        raise ValueError(f"config.json asks for {asked:,} parameters, and all files are {held:,} bytes")


def _would_belong(key: str, model: nn.Module) -> bool:
    """Whether it is of a layer that the model lacks; not of a picture's encoder beside it, nor a computed table."""
    part = ".".join(key.split(".")[:2])  # such as model.layers
    return part in dict(model.named_modules()) and not key.endswith("inv_freq")


def device_of(device: str) -> torch.device:
    """The device by its name, of which auto is CUDA's if there is one; ValueError in one line if there is none such."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        place = torch.device("meta")
    if place.type not in ("cpu", "cuda") and not (place.type == "mps" and torch.backends.mps.is_available()):
        raise ValueError(f"no such device: {device!r} (expected auto, cpu, cuda or cuda:1)")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {device!r}: torch sees {torch.cuda.device_count()} CUDA devices here")
    return place


def names_of(folders: list[Path]) -> list[str]:
    """Short names that tell the folders apart: the last part, and as many parents as it takes."""
    resolved = [folder.resolve() for folder in folders]
    repeated = {str(f) for f in resolved if resolved.count(f) > 1}
    if repeated:
        raise ValueError(f"a model is named twice: {', '.join(sorted(repeated))}")
    parts = 1
    while True:
        names = ["/".join(folder.parts[-parts:]) for folder in resolved]
        if len(set(names)) == len(names):
            return names
        parts += 1
