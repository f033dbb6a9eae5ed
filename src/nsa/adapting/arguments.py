"""The arguments of `nsa convert` and `nsa adapt`, apart from the work, so that `--help` is fast."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from nsa.config import NSAConfig

Device = Annotated[str, tyro.conf.arg(metavar="DEVICE")]


@dataclass(frozen=True)
class ConvertArguments:
    """Make a dense checkpoint sparse: Llama, SmolLM, Mistral, Qwen2, Qwen3, Phi-3, Gemma 2 and 3, or a dense twin.

    The new folder is loaded by AutoModelForCausalLM (trust_remote_code=True, or after `import nsa.models`) and
    generates at once. Nothing is trained: what is new starts so that the model computes nearly what it did, and
    `nsa adapt` trains it.

    Examples:
        nsa convert models/Qwen3-0.6B models/qwen3-nsa
        nsa convert models/smollm2 models/smollm2-nsa --nsa.window-size 256 --text novel.txt
        nsa convert models/llama models/llama-nsa --layers 2-29
    """

    dense: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DENSE")]
    """Folder of the dense model, as save_pretrained, a hub's download or a hub's cache has it; sharded or not."""
    output: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder for the sparse one: new or empty."""
    method: Literal["nsa"] = "nsa"
    """What takes the place of dense attention."""
    layers: tuple[str, ...] = ()
    """Numbers of the layers that become sparse, such as 0 3 8-29. Default: all without a sliding window."""
    nsa: NSAConfig = field(default_factory=NSAConfig)
    """NSA's block sizes and counts; those of a dense twin are its own by default."""
    gate_bias: float = 6.0
    """Gates start at sigmoid(bias) for the selected branch, sigmoid(-bias) for the others: 6 lets .25% of them through;
    30 keeps the function to rounding where every block fits, with gates that do not learn."""
    text: Annotated[str, tyro.conf.arg(metavar="PATH")] = "python"
    """A text to measure the loss on before and after: a file or folder, or Python sources of this machine."""
    tokens: int = 4096
    """How much of it, at most the model's positions; 0: no loss is measured."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the new folder; auto: that of the dense one."""
    device: Device = "auto"
    """Where the losses are computed: auto (CUDA if there is a GPU), cpu, cuda."""


def default_sizes(arguments: list[str]) -> NSAConfig:
    """NSA's sizes that other flags then change: those of a model of the command line that has some, or the paper's."""
    for argument in arguments:
        try:
            values: Any = json.loads((Path(argument).expanduser() / "config.json").read_text(encoding="utf-8"))
            return NSAConfig.from_dict(values["nsa"])
        except (OSError, ValueError, TypeError, KeyError, RuntimeError):
            continue
    return NSAConfig()


def layer_numbers(given: tuple[str, ...]) -> list[int] | None:
    """ "0", "3", "8-29" -> numbers; None for none given; ValueError in one line for anything else."""
    if not given:
        return None
    numbers: list[int] = []
    for part in given:
        first, _, last = part.partition("-")
        if not (first.isdecimal() and (last.isdecimal() or part == first)) or len(part) > 12:
            raise ValueError(f"--layers: expected numbers and ranges such as 0 3 8-29, got {part!r}")
        numbers += range(int(first), int(last or first) + 1)
        if len(numbers) > 10_000:
            raise ValueError(f"--layers: {part} are more layers than any model has")
    return numbers
