"""transformers' own OpenAI server, for machines without vLLM: every request is a `generate()` of its own."""

import importlib.util
from dataclasses import fields
from typing import Any

from nsa.serving.arguments import ServeArguments

NEEDS = ("fastapi", "uvicorn", "pydantic", "openai")
TAKES = ("model", "host", "port", "engine", "dtype")


def check(arguments: ServeArguments, key: str | None) -> None:
    """ValueError in one line where something is asked that this server has not, or packages of it are missing."""
    if key:
        raise ValueError("api_key: transformers' server asks for none; expected vLLM for it, or no api_key")
    if arguments.name:
        raise ValueError(f"name: transformers' server calls a model by its path; expected none, got {arguments.name!r}")
    for option in fields(arguments):
        if option.name not in TAKES and (value := getattr(arguments, option.name)) != option.default:
            raise ValueError(f"{option.name}: transformers' server has no such option; expected vLLM, got {value!r}")
    missing = [package for package in NEEDS if importlib.util.find_spec(package) is None]
    if missing:
        raise ValueError(
            f"transformers' server needs {', '.join(missing)}, not installed here; expected vLLM, or "
            "pip install 'transformers[serving]'"
        )


def run(arguments: ServeArguments) -> None:
    """Until interrupted."""
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.cli.serve import Serve

    import nsa.models  # noqa: F401 which tells the Auto classes

    # The server looks the class up by its name in the package.
    found: Any = transformers
    made: Any = AutoModelForCausalLM._model_mapping[type(AutoConfig.from_pretrained(arguments.model))]
    setattr(found, made.__name__, made)
    Serve(
        force_model=str(arguments.model.resolve()), host=arguments.host, port=arguments.port, dtype=arguments.dtype,
    )  # fmt: skip
