"""The arguments of `nsa convert` and `nsa adapt`, apart from the work, so that `--help` is fast."""

import json
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from nsa.adapting.folder import find_model
from nsa.config import GATE_BIAS, InfLLMv2Config, NSAConfig
from nsa.methods.registry import SparseAttention

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
        nsa convert models/llama models/llama-infllm --method infllm_v2 --infllm-v2.dense-len 4096
        nsa convert models/llama llama-pool4 --method infllm_v2 --infllm-v2.kernel-size 4 --infllm-v2.kernel-stride 4
    """

    dense: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DENSE")]
    """Folder of the dense model, as save_pretrained, a hub's download or a hub's cache has it; sharded or not."""
    output: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder for the sparse one: new or empty."""
    method: SparseAttention = "nsa"
    """What takes the place of dense attention: NSA; or InfLLM-V2, which adds no weight."""
    layers: tuple[str, ...] = ()
    """Numbers of the layers that become sparse, such as 0 3 8-29. Default: all without a sliding window."""
    nsa: NSAConfig = field(default_factory=NSAConfig)
    """NSA's block sizes and counts; those of a dense twin are its own by default."""
    infllm_v2: InfLLMv2Config = field(default_factory=InfLLMv2Config)
    """InfLLM-V2's, in the same way. With kernel-size 4 and kernel-stride 4 converting SmolLM2-135M costs .003 of loss
    at 8,192 tokens, with the paper's pools of 32 keys .024; a query attends to as many keys, and reads four times as
    many to choose (docs/convert.md)."""
    gate_bias: float = GATE_BIAS
    """Of NSA: gates start at sigmoid(bias) for the selected branch, sigmoid(-bias) for the others: 6 lets .25% of
    these through; 30 keeps the function to rounding where every block fits, with gates that do not learn."""
    text: Annotated[str, tyro.conf.arg(metavar="PATH")] = "python"
    """A text to measure the loss on before and after: a file or folder, or Python sources of this machine."""
    tokens: int = 4096
    """How much of it, at most the model's positions; 0: no loss is measured."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the new folder; auto: that of the dense one."""
    device: Device = "auto"
    """Where the losses are computed: auto (CUDA if there is a GPU), cpu, cuda."""


def default_sizes(arguments: list[str]) -> dict[str, NSAConfig | InfLLMv2Config]:
    """The sizes that other flags then change: those of a model of the command line that has some, or the papers'."""
    found: dict[str, NSAConfig | InfLLMv2Config] = {}
    kinds: tuple[tuple[str, type[NSAConfig | InfLLMv2Config]], ...] = (
        ("nsa", NSAConfig),
        ("infllm_v2", InfLLMv2Config),
    )
    for argument, (name, kind) in product(arguments, kinds):
        try:
            folder = find_model(Path(argument).expanduser())
            values: Any = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            found.setdefault(name, kind.from_dict(values[name]))
        except (OSError, ValueError, TypeError, KeyError, RuntimeError):
            continue
    return found


def layer_numbers(given: tuple[str, ...]) -> list[int] | None:
    """ "0", "3", "8-29" -> numbers; None for none given; ValueError in one line for anything else."""
    if not given:
        return None
    numbers: list[int] = []
    for part in given:
        first, _, last = part.partition("-")
        is_range = first.isdecimal() and (last.isdecimal() or part == first) and len(part) <= 12
        if not is_range or int(first) > int(last or first):
            raise ValueError(f"--layers: expected numbers and ranges such as 0 3 8-29, got {part!r}")
        numbers += range(int(first), int(last or first) + 1)
        if len(numbers) > 10_000:
            raise ValueError(f"--layers: {part} are more layers than any model has")
    return numbers


@dataclass(frozen=True, kw_only=True)
class AdaptArguments:
    """Win back what a converted model lost, by training beside the dense model that it came from.

    Stage 1 trains what is new alone (gates, phi, keys and values of compression and window), layer by layer: each
    layer's output for the dense model's input to it should be the dense layer's, and blocks should be scored by the
    dense attention they get. Stage 2 trains all weights by the text and by the dense model's predictions. The dense
    model is trained on the same tokens as stage 2 as a yardstick. Every stage is a run as `nsa train` makes it.

    Examples:
        nsa adapt models/qwen3-nsa --out runs/qwen3 --data ~/texts
        nsa adapt models/qwen3-nsa --out runs/qwen3 --data ~/texts --resume
        nsa adapt models/smollm2-nsa --first 8192x300 --second 2048x500 8192x200 --batch-tokens 65536 --dtype bfloat16
        nsa adapt models/qwen3-nsa --first 2048x500 --second 2048x500 --lora 16
    """

    sparse: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SPARSE")]
    """Folder that `nsa convert` wrote."""
    dense: Annotated[Path | None, tyro.conf.arg(metavar="DENSE")] = None
    """Folder of the dense model; by default the one that it was converted from."""
    out: Path = Path("runs/adapted")
    """Folder for the runs stage-1, stage-2, dense-trained and for adapt.json: new, empty, or a run's with --resume."""
    first: tuple[str, ...] = ("2048x300",)
    """Stage 1's curriculum, LENGTHxSTEPS as in `nsa train`, of the length that is meant; none: it is left out."""
    second: tuple[str, ...] = ("2048x300",)
    """Stage 2's curriculum; none: it is left out, and the dense model is not trained."""
    twin: bool = True
    """Train the dense model on stage 2's tokens, in the same way but without a teacher."""
    resume: bool = False
    """Go on where a run was stopped."""

    # Data
    data: str = "python"
    """As in `nsa train`: python (sources on this machine), or a file or folder of text."""
    text_field: str = "text"
    """Where the text is in a line of .jsonl, or a row of a table."""
    max_bytes: int = 50_000_000
    """How much text to take for training; a tenth as much is held out."""
    cache_dir: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """Where tokenized text is kept for the next start; by default ~/.cache/nsa."""
    batch_tokens: int = 16384
    """Tokens in one forward pass."""
    accumulation: int = 1
    """Forward passes in one step of the optimizer."""

    # Optimisation
    first_rate: float = 1e-3
    """Stage 1's learning rate."""
    second_rate: float = 3e-5
    """Stage 2's, and that of the dense model."""
    blocks_weight: float = 0.1
    """Of the divergence of block scores, beside the layers' errors, in stage 1; 0: only errors."""
    selector_loss: float = 0.5
    """Of the divergence of block scores from the attention that is paid to the blocks, in stage 2 (of NSA)."""
    selector_queries: int = 256
    """Queries of a batch that a divergence of block scores looks at, in both stages."""
    teacher_weight: float = 1.0
    """Of the divergence from the dense model's predictions, beside the text's loss, in stage 2; 0: no teacher, which is
    better on text that is new to the dense model (docs/convert.md)."""
    lora: int = 0
    """Rank of what stage 2 trains of each linear map, beside gates and phi; 0: all weights."""
    warmup_steps: int = 20
    gradient_checkpointing: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: fp32 weights, computation under autocast."""
    compile: bool = field(default_factory=lambda: Path("/dev/nvidiactl").exists())
    """torch.compile of each layer in stage 2; by default where there is a CUDA GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""
    seed: int = 0

    # Records
    eval_every: int = 100
    """Steps between evaluations, of which the last step has one too; 0: none at all."""
    eval_tokens: int = 32768
    """Tokens of held-out text in an evaluation."""
    save_every: int = 100
    """Steps between checkpoints."""
    log_every: int = 10
    quiet: bool = False
    """No progress bar."""
