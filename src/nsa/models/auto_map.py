"""What lets the Auto classes load a folder without `import nsa.models`: a file of imports, named in its config.json."""

from pathlib import Path
from typing import Any

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

CODE = "modeling_nsa.py"
AUTO: dict[str, Any] = {
    "Model": AutoModel,
    "ForCausalLM": AutoModelForCausalLM,
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForTokenClassification": AutoModelForTokenClassification,
}
TEXT = '''"""Loads this folder with the library nsa (Native Sparse Attention), which has to be installed."""

try:
    from nsa.models.families import (
        {names},
    )
except ImportError as error:
    raise ImportError(
        "this model needs the library nsa (Native Sparse Attention), installed from where the model's maker says; "
        "a package of that name on an index need not be it"
    ) from error
'''


def write_auto_map(config: Any, folder: Path) -> None:
    """Write the file into a model's folder, and name it in the configuration that will be saved there."""
    names = {"AutoConfig": type(config).__name__}
    for auto in AUTO.values():
        if type(config) in auto._model_mapping:
            names[auto.__name__] = auto._model_mapping[type(config)].__name__
    config.auto_map = {auto: f"{CODE.removesuffix('.py')}.{name}" for auto, name in names.items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CODE).write_text(TEXT.format(names=",\n        ".join(sorted(names.values()))), encoding="utf-8")
