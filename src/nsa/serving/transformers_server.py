"""transformers' own OpenAI server, for machines without vLLM: every request is a `generate()` of its own."""

import importlib.util
from typing import Any

from nsa.serving.arguments import ServeArguments

NEEDS = ("fastapi", "uvicorn", "pydantic", "openai")


def run(arguments: ServeArguments) -> None:
    """Until interrupted.

    Raises:
        ValueError: packages of `transformers[serving]` are missing.
    """
    missing = [package for package in NEEDS if importlib.util.find_spec(package) is None]
    if missing:
        raise ValueError(
            f"transformers' server needs {', '.join(missing)}, not installed here; expected vLLM, or "
            "pip install 'transformers[serving]'"
        )
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
