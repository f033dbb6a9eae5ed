"""A saved model that is wholly there, or one line that says what is not."""

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.utils import logging

import nsa.models  # noqa: F401  (makes the Auto classes know NSA)
from nsa.training.tokenizer import first_line, load_tokenizer


def load_model(folder: Path, *, trust_remote_code: bool = False, **options: Any) -> tuple[Any, PreTrainedTokenizerBase]:
    """The causal language model in a folder, and its tokenizer.

    transformers draws weights that a folder lacks at random, and goes on; here that is an error.

    Args:
        folder: with config.json, weights and tokenizer.
        trust_remote_code: run Python files of the folder where its configuration names them; without it, such a
            folder is refused.
        options: more for from_pretrained.

    Raises:
        ValueError: a folder that holds no model, files that are damaged, or weights that are not those of the model
            in config.json, in one line.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no model: expected a folder with config.json")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        tokenizer = load_tokenizer(str(folder), trust_remote_code=trust_remote_code)
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # listed below, with the rest
            **options,
        )
    except ValueError as error:
        raise ValueError(f"no model could be loaded from {folder}: {first_line(error)}") from error
    except Exception as error:  # of other libraries, for damaged files: anything
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"no model could be loaded from {folder}: {reason}") from error
    finally:
        logging.set_verbosity(verbosity)
    for fault, names in (
        ("lacks weights of the model in its config.json", found["missing_keys"]),
        ("has weights of other shapes than its config.json", [name for name, *_ in found["mismatched_keys"]]),
        ("has weights that the model in its config.json does not", found["unexpected_keys"]),
    ):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise ValueError(f"{folder} {fault}: {len(names)} ({shown})")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):  # transformers takes any value until it generates
        ids = getattr(model.generation_config, name)
        if ids is not None and not all(isinstance(token, int) for token in (ids if isinstance(ids, list) else [ids])):
            raise ValueError(
                f"{folder}/generation_config.json: {name} should be one token's number or more, got {ids!r}"
            )
    return model, tokenizer
