"""Everything that decides a training run, in one frozen dataclass; it is saved beside the checkpoint."""

import importlib.util
import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from nsa.config import InfLLMv2Config, NSAConfig
from nsa.files import write_whole
from nsa.methods.registry import Attention
from nsa.training.curriculum import Stage, parse_curriculum
from nsa.training.folder import CONFIG_FILE, at_home
from nsa.training.limits import ANY, Limits, check_numbers

# What may differ between a run and its continuation: none of it changes what is computed.
FREE_ON_RESUME = frozenset(
    {
        "preset",
        "resume",
        "log_every",
        "save_every",
        "keep_checkpoints",
        "report_to",
        "quiet",
        "workers",
        "cache_dir",
        "cuda_graphs",
        "dp_replicate",
        "dp_shard",
        "cp",
        "tp",
        "gather_once",
    }
)
REPORTERS = ("tensorboard", "wandb")
AT_LEAST_ONE = (1, math.inf)
LIMITS: dict[str, Limits] = {
    **dict.fromkeys(("max_bytes", "batch_tokens", "accumulation", "eval_tokens", "log_every"), AT_LEAST_ONE),
    **dict.fromkeys(("dp_replicate", "cp", "tp", "selector_queries"), AT_LEAST_ONE),
    **dict.fromkeys(("hidden_size", "num_layers", "num_heads", "num_kv_heads", "intermediate_size"), AT_LEAST_ONE),
    "vocab_size": AT_LEAST_ONE,
    "rope_theta": AT_LEAST_ONE,
    **dict.fromkeys(("compressed_gate_bias", "selected_gate_bias", "window_gate_bias"), ANY),
    "decay_share": (0, 1),
    "beta2": (0, 0.999999),
    "threads": (0, 4096),
    "workers": (0, 256),
    "seed": (0, 2**32 - 1),
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a language model from scratch.

    Presets: `--preset demo` (0.5M parameters, CPU, minutes), `small` (25M), `1b` (for GPUs). Any flag overrides the
    preset's value.

    Examples:
        nsa train --preset demo --out runs/nsa
        nsa train --preset demo --attention dense --out runs/dense
        nsa train --preset demo --attention infllm_v2 --infllm-v2.topk 6 --out runs/infllm
        nsa train --preset small --data ~/texts --tokenizer bpe --vocab-size 8192 --out runs/books
        nsa train --out runs/nsa --resume
        torchrun --nproc-per-node 8 -m nsa train --preset 1b --cp 8 --out runs/long
    """

    out: Path = Path("runs/nsa")
    """Folder for checkpoints, metrics, the configuration and the final model: new, empty, or a run's with --resume."""
    preset: str = "demo"
    """Where the values of all other flags start from: demo, small or 1b."""
    attention: Attention = "nsa"
    """NSA, InfLLM-V2, or a twin without sparsity; they differ in nothing else."""
    resume: bool = False
    """Continue from the last checkpoint in `out`, exactly as if it had not stopped; with its configuration."""

    # Data
    data: str = "python"
    """python (sources on this machine); or a file or folder of text, .jsonl, .parquet, any of these as .gz, a Hugging
    Face dataset saved to disk, or tokens (.bin of uint16, .npy of integers)."""
    text_field: str = "text"
    """Where the text is in a line of .jsonl, or a row of a table."""
    max_bytes: int = 50_000_000
    """How much text to take for training; a tenth as much is held out."""
    tokenizer: str = "bytes"
    """bytes, bpe (trained on the corpus), or a folder with a tokenizer (needed for token files not of bytes)."""
    vocab_size: int = 8192
    """Of a bpe tokenizer."""
    cache_dir: Path | None = None
    """Where trained tokenizers and tokenized text are kept for the next start; by default ~/.cache/nsa."""
    layout: Literal["rows", "flat"] = "rows"
    """rows: each row from one document; flat: one packed row a batch, whose documents do not see each other."""
    curriculum: tuple[str, ...] = ("512x1000:retrieval=0.1",)
    """Stages LENGTHxSTEPS[:repeated=SHARE][:retrieval=SHARE][:puzzles=SHARE][:keys=NUMBER][:style=assert]
    [:blocks=all], in order. blocks=all: every query selects all blocks in these steps."""
    answer_weight: float = 1.0
    """How much a token of an answer in a retrieval row counts in the training loss; any other counts 1."""
    batch_tokens: int = 16384
    """Tokens in one forward pass."""
    accumulation: int = 1
    """Forward passes in one step of the optimizer; several processes divide them among themselves."""

    # Model
    hidden_size: int = 256
    num_layers: int = 4
    num_heads: int = 8
    num_kv_heads: int = 2
    intermediate_size: int = 688
    rope_theta: float = 10000.0
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    tie_embeddings: bool = True
    compressed_gate_bias: float = 0.0
    """Where the gates of the compressed branch start: 0 at one half, -2 at an eighth."""
    selected_gate_bias: float = 0.0
    """The same of the selected branch."""
    window_gate_bias: float = 0.0
    """The same of the window branch."""
    dense_layers: tuple[int, ...] = ()
    """Numbers of the layers, from 0, that keep dense attention beside those with NSA or InfLLM-V2."""
    nsa: NSAConfig = field(default_factory=NSAConfig)
    """NSA's block sizes and counts; the window twin uses the same window."""
    infllm_v2: InfLLMv2Config = field(default_factory=InfLLMv2Config)
    """InfLLM-V2's."""

    # Optimisation
    selector_loss: float = 0.0
    """Weight of the selector's own loss (of NSA; the others have none): how far its block scores are from the attention
    that its queries would pay to the blocks, mean over layers."""
    selector_queries: int = 256
    """Queries of a batch that this loss looks at; fewer where all their heads have more than 2^26 scores with a row."""
    learning_rate: float = 1e-3
    warmup_steps: int = 20
    decay_share: float = 0.5
    """Share of the steps, at the end, over which the learning rate falls to a twentieth."""
    weight_decay: float = 0.1
    beta2: float = 0.95
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: fp32 weights, computation under autocast."""
    compile: bool = field(default_factory=lambda: Path("/dev/nvidiactl").exists())
    """torch.compile of all layers as one graph, of several processes of each; by default where there is a CUDA GPU."""
    cuda_graphs: bool = True
    """Of what one process compiles on a GPU: all launches of a pass at once. Their memory is held from step to step."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""
    workers: int = 2
    """Processes that make batches ahead of a GPU; a CPU has none to spare."""
    seed: int = 0

    # Several processes: torchrun --nproc-per-node N -m nsa train ...
    dp_replicate: int = 1
    """Copies of the model, each with batches of its own."""
    dp_shard: int = 0
    """Ranks over which a copy is sharded (FSDP), each with batches of its own; 0: all that are left."""
    cp: int = 1
    """Ranks that share every sequence: each has two pieces of it (context parallelism)."""
    tp: int = 1
    """Ranks that share every layer's heads (tensor parallelism)."""
    gather_once: bool = False
    """Weights that ranks have in pieces stay whole from forward to backward: a quarter to a third less is sent."""

    # Records
    eval_every: int = 100
    """Steps between evaluations, of which the last step has one too; 0: none at all."""
    eval_tokens: int = 32768
    """Tokens of held-out text, and of retrieval rows, in an evaluation."""
    save_every: int = 100
    """Steps between checkpoints; 0: only at the end, and at Ctrl-C."""
    keep_checkpoints: int = 2
    """How many of them, the newest; 0: all."""
    log_every: int = 10
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Other places for the metrics, as Trainer has them."""
    quiet: bool = False
    """No progress bar."""

    @property
    def stages(self) -> tuple[Stage, ...]:
        return parse_curriculum(self.curriculum)

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    @property
    def context(self) -> int:
        """Tokens in the longest row."""
        return max(stage.length for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self), default=str))

    def save(self, folder: Path) -> None:
        write_whole(folder / CONFIG_FILE, json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "TrainConfig":
        """The configuration that a run was started with; ValueError in one line where its file holds none."""
        path = folder / CONFIG_FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            paths = {name: Path(values[name]) for name in ("out", "cache_dir") if values.get(name) is not None}
            lists = ("curriculum", "report_to", "dense_layers")
            tuples = {name: tuple(values[name]) for name in lists if name in values}
            sizes = {
                "nsa": NSAConfig.from_dict(values["nsa"]),
                "infllm_v2": InfLLMv2Config.from_dict(values.get("infllm_v2", {})),
            }
            config = cls(**values | paths | tuples | sizes)
            config.validate()
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"{path} is not the configuration of a run: {reason}") from error
        return config

    def validate(self) -> None:
        """ValueError in one line for a value that no run can have."""
        check_numbers(self, LIMITS)
        _ = self.stages
        if self.num_heads % self.num_kv_heads or self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                "num_heads should be a multiple of num_kv_heads, and hidden_size one of 2 * num_heads (rotation takes "
                "the dimensions of a head in pairs), got "
                f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, hidden_size={self.hidden_size}"
            )
        if self.tokenizer != "bytes" and self.tokenizer != "bpe" and not at_home(self.tokenizer).is_dir():
            raise ValueError(f"tokenizer should be bytes, bpe or a folder, got {self.tokenizer!r}")
        if self.dense_layers and (self.cp > 1 or self.tp > 1):
            raise ValueError(
                f"dense_layers: expected none, or cp=1 and tp=1, got {self.dense_layers}, cp={self.cp}, tp={self.tp}"
            )
        if self.selector_loss and self.attention == "nsa" and (self.cp > 1 or self.tp > 1):
            raise ValueError(
                "selector_loss needs whole sequences and all heads on a rank: expected cp=1, tp=1 or selector_loss=0, "
                f"got selector_loss={self.selector_loss:g}, cp={self.cp}, tp={self.tp}"
            )
        if self.cp > 1 and any(stage.all_blocks for stage in self.stages):
            raise ValueError(f"curriculum: blocks=all needs whole sequences on a rank: expected cp=1, got cp={self.cp}")
        for name in self.report_to:
            if name not in REPORTERS:
                raise ValueError(f"report_to should be of {', '.join(REPORTERS)}, got {name!r}")
            if importlib.util.find_spec(name) is None:
                raise ValueError(f"report_to {name}: not installed here; pip install {name}")


def differences(saved: dict[str, Any], config: TrainConfig) -> list[str]:
    """Fields in which a checkpoint's configuration is another one: "name: saved, now"."""
    saved, now = TrainConfig().to_dict() | saved, config.to_dict()
    names = [f.name for f in fields(TrainConfig) if f.name not in FREE_ON_RESUME | {"out"}]
    found = []
    for name in names:
        if isinstance(now[name], dict) and isinstance(saved.get(name), dict):
            keys = [key for key in now[name] if saved[name].get(key) != now[name][key]]
            found += [f"{name}.{key}: {saved[name].get(key)!r}, now {now[name][key]!r}" for key in keys]
        elif saved.get(name) != now[name]:
            found.append(f"{name}: {saved.get(name)!r}, now {now[name]!r}")
    return found
