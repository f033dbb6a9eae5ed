"""Everything that decides a training run, in one frozen dataclass; it is saved beside the checkpoint."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from nsa.config import NSAConfig
from nsa.training.curriculum import Stage, parse_curriculum

CONFIG_FILE = "train_config.json"
# What may differ between a run and its continuation: none of it changes what is computed.
FREE_ON_RESUME = frozenset({"preset", "resume", "log_every", "save_every", "keep_checkpoints", "tensorboard", "quiet"})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a language model from scratch.

    Presets: `--preset demo` (0.5M parameters, CPU, minutes), `small` (25M), `1b` (for GPUs). Any flag overrides the
    preset's value.

    Examples:
        nsa train --preset demo --out runs/nsa
        nsa train --preset demo --attention dense --out runs/dense
        nsa train --preset small --data ~/texts --tokenizer bpe --vocab-size 8192 --out runs/books
        nsa train --preset demo --out runs/nsa --resume
    """

    out: Path = Path("runs/nsa")
    """Folder for checkpoints, metrics, the configuration and the final model."""
    preset: str = "demo"
    """Where the values of all other flags start from: demo, small or 1b."""
    attention: Literal["nsa", "dense", "window"] = "nsa"
    """NSA, or one of its twins that differ in nothing else."""
    resume: bool = False
    """Continue from the last checkpoint in `out`, exactly as if it had not stopped."""

    # Data
    data: str = "python"
    """python (sources on this machine), a text file or folder, or a token file (.bin of uint16, .npy of integers)."""
    max_bytes: int = 50_000_000
    """How much text to take for training; a tenth as much is held out."""
    tokenizer: str = "bytes"
    """bytes, bpe (trained on the corpus), or a folder with a tokenizer (needed for token files not of bytes)."""
    vocab_size: int = 8192
    """Of a bpe tokenizer."""
    layout: Literal["rows", "flat"] = "rows"
    """rows: each row from one document; flat: one packed row a batch, whose documents do not see each other."""
    curriculum: tuple[str, ...] = ("512x1000:retrieval=0.1",)
    """Stages LENGTHxSTEPS[:repeated=SHARE][:retrieval=SHARE][:puzzles=SHARE][:keys=NUMBER][:style=assert], in order."""
    answer_weight: float = 1.0
    """How much a token of an answer in a retrieval row counts in the training loss; any other counts 1."""
    batch_tokens: int = 16384
    """Tokens in one forward pass."""
    accumulation: int = 1
    """Forward passes in one step of the optimizer."""

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
    nsa: NSAConfig = field(default_factory=NSAConfig)
    """NSA's block sizes and counts; the window twin uses the same window."""

    # Optimisation
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
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""
    seed: int = 0

    # Records
    eval_every: int = 100
    """Steps between evaluations; 0: only at the end."""
    eval_tokens: int = 32768
    """Tokens of held-out text, and of retrieval rows, in an evaluation."""
    save_every: int = 100
    """Steps between checkpoints; 0: only at the end."""
    keep_checkpoints: int = 2
    log_every: int = 10
    tensorboard: bool = False
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
        return {**asdict(self), "out": str(self.out), "curriculum": list(self.curriculum)}

    def save(self, folder: Path) -> None:
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        part = folder / (CONFIG_FILE + ".part")
        part.write_text(text)
        part.replace(folder / CONFIG_FILE)

    def validate(self) -> None:
        """ValueError in one line for a value that no run can have."""
        _ = self.stages
        for name in ("batch_tokens", "accumulation", "hidden_size", "num_layers", "num_heads", "num_kv_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} should be at least 1, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads or self.hidden_size % self.num_heads:
            raise ValueError(
                "num_heads should be a multiple of num_kv_heads and divide hidden_size, got "
                f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, hidden_size={self.hidden_size}"
            )
        if not 0.0 <= self.decay_share <= 1.0:
            raise ValueError(f"decay_share should lie between 0 and 1, got {self.decay_share}")
        if self.tokenizer != "bytes" and self.tokenizer != "bpe" and not Path(self.tokenizer).is_dir():
            raise ValueError(f"tokenizer should be bytes, bpe or a folder, got {self.tokenizer!r}")

    @classmethod
    def default_for(cls, arguments: list[str]) -> "TrainConfig":
        """The preset that the command line names: what its other flags then change."""
        from nsa.training.presets import preset

        for place, argument in enumerate(arguments):
            if argument == "--preset" and place + 1 < len(arguments):
                return preset(arguments[place + 1])
            if argument.startswith("--preset="):
                return preset(argument.removeprefix("--preset="))
        return preset("demo")

    def run(self) -> None:
        from nsa.training.train import train

        train(self)


def differences(saved: dict[str, Any], config: TrainConfig) -> list[str]:
    """Fields in which a checkpoint's configuration is another one: "name: saved, now"."""
    now = json.loads(json.dumps(config.to_dict()))
    names = [f.name for f in fields(TrainConfig) if f.name not in FREE_ON_RESUME | {"out"}]
    found = []
    for name in names:
        if isinstance(now[name], dict) and isinstance(saved.get(name), dict):
            keys = [key for key in now[name] if saved[name].get(key) != now[name][key]]
            found += [f"{name}.{key}: {saved[name].get(key)!r}, now {now[name][key]!r}" for key in keys]
        elif saved.get(name) != now[name]:
            found.append(f"{name}: {saved.get(name)!r}, now {now[name]!r}")
    return found
