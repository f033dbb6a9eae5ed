"""Writes docs/api.md: every public name with the first line of its docstring. `python docs/api.py`"""

import importlib
import inspect
from pathlib import Path

PAGE = Path(__file__).with_name("api.md")
MODULES = {
    "nsa": None,
    "nsa.config": None,
    "nsa.models": None,
    "nsa.cache": None,
    "nsa.backend": ("resolve", "use_backend", "why_not_triton"),
    "nsa.modules.compression": ("Compression",),
    "nsa.modules.rotary": ("RotaryEmbedding", "rotate"),
    "nsa.ops.compress": ("compress", "phi_mean"),
    "nsa.ops.compressed_attention": ("compressed_attention",),
    "nsa.ops.selection": ("block_scores", "select_blocks"),
    "nsa.ops.selected_attention": ("selected_attention",),
    "nsa.ops.window_attention": ("window_attention",),
    "nsa.ops.combine": ("combine",),
    "nsa.methods.infllm_v2": ("infllm_v2_attention",),
    "nsa.distributed": None,
    "nsa.serving": None,
    "nsa.testing": None,
}
HEAD = """# The public names

Written by `docs/api.py` from the code: signature and first line; the docstrings have shapes, units and errors. What is
not here may change without notice. Commands: `nsa --help`; sizes of models and runs: `nsa train --help`.
"""


def names_of(module: object) -> list[str]:
    """What a module offers: its __all__, else the public classes and functions that are its own."""
    own = [
        name
        for name, value in vars(module).items()
        if name[0] != "_"
        and inspect.getmodule(value) is module
        and (inspect.isclass(value) or inspect.isfunction(value))
    ]
    return sorted(getattr(module, "__all__", own))


def signature(value: object) -> str:
    """The names of the arguments, those with a default in brackets; nothing for what takes any."""
    try:
        parameters = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):
        return ""
    taken = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and not p.name.startswith("_")]
    if len(taken) > 20:  # mostly a parent's, of another library
        taken = [p for p in taken if p.name in vars(value).get("__annotations__", {})]
    needed = ", ".join(p.name for p in taken if p.default is p.empty)
    others = ", ".join(p.name for p in taken if p.default is not p.empty)
    return f"({needed}{' ' if needed and others else ''}{f'[{others}]' if others else ''})"


def page() -> str:
    parts = [HEAD]
    for name, chosen in MODULES.items():
        module = importlib.import_module(name)
        first = (inspect.getdoc(module) or "").splitlines()[0]
        parts.append(f"## `{name}`\n\n{first}\n")
        for public in chosen or names_of(module):
            value = getattr(module, public)
            text = (inspect.getdoc(value) or "").split("\n\n")[0].replace("\n", " ") if callable(value) else ""
            parts.append(f"* `{public}{signature(value)}`" + (f": {text}" if text else ""))
        parts.append("")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
