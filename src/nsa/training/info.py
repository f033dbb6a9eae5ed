"""What a model takes and reads at a context and a batch, beside its dense twin, planned, not run."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from nsa.training.limits import check_numbers

if TYPE_CHECKING:
    from nsa.models import NSALlamaConfig
    from nsa.models.plan import Plan

GIB = 2**30
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim",
)  # fmt: skip
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class InfoConfig:
    """Parameters, cache, keys read, memory and decoding time of a model, planned from its configuration.

    The decoding time is a floor: the bytes that a step reads, at the bandwidth of the GPU's data sheet.

    Examples:
        nsa info runs/nsa
        nsa info 1b --context 65536 --batch 8
        nsa info models/llama --context 131072 --gpu H100 --prefill-chunk 8192
        nsa info 1b --context 1000000 --bandwidth 1200 --json
    """

    model: Annotated[str, tyro.conf.Positional]
    """Folder of a model (a run of `nsa train`, a Llama), or a preset: demo, small, 1b."""
    context: int = 65536
    """Tokens of each row, those to be generated included."""
    batch: int = 1
    """Rows."""
    prefill_chunk: int = 16384
    """Tokens of a row prefilled at once; 0 is all of them."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights and cache; auto is the checkpoint's, bfloat16 for a preset."""
    gpu: str = "H200"
    """Whose bandwidth and memory to plan with: A100-40GB, A100-80GB, H100-PCIe, H100, H200, B200, A10, L4, L40S,
    "RTX 3090", "RTX 4090" or "RTX 5090"."""
    bandwidth: Annotated[float | None, tyro.conf.arg(metavar="GB/S")] = None
    """Memory bandwidth instead, in 1e9 bytes a second."""
    json: bool = False
    """Print JSON instead of a table."""


def info(config: InfoConfig) -> dict[str, Any]:
    """What `nsa info` prints.

    Raises:
        ValueError: no such model or GPU, or counts that are not positive, in one line.
    """
    check_numbers(config, {"context": (1, math.inf), "batch": (1, math.inf)})
    if config.bandwidth == 0:
        raise ValueError("bandwidth should be positive, got 0")

    import torch

    from nsa.costs.devices import GPUS
    from nsa.methods.registry import trained
    from nsa.models.plan import plan

    if config.gpu not in GPUS:
        raise ValueError(f"--gpu: expected one of {', '.join(map(repr, GPUS))}, got {config.gpu!r}")
    model, stored = _configuration(config.model)
    dtype = getattr(torch, stored if config.dtype == "auto" else config.dtype)
    bandwidth = GPUS[config.gpu][0] if config.bandwidth is None else config.bandwidth
    chunk = config.prefill_chunk or config.context
    plans = plan(model, context=config.context, batch=config.batch, chunk=chunk, dtype=dtype)

    def entry(found: "Plan") -> dict[str, Any]:
        seconds = found.step_seconds(bandwidth * 1e9)
        return asdict(found) | {
            "total_bytes": found.total_bytes,
            "step_ms": seconds * 1e3,
            "tokens_per_second": config.batch / seconds,
        }

    return {
        "model": config.model,
        "context": config.context,
        "batch": config.batch,
        "prefill_chunk": min(chunk, config.context),
        "dtype": str(dtype).removeprefix("torch."),
        "gpu": config.gpu if config.bandwidth is None else None,
        "bandwidth_gb_per_s": bandwidth,
        "memory_bytes": GPUS[config.gpu][1] * GIB if config.bandwidth is None else None,
        trained(model).sizes: trained(model).sizes_of(model).to_dict(),
        "plans": {name: entry(found) for name, found in plans.items()},
    }


def _configuration(name: str) -> tuple["NSALlamaConfig", str]:
    """The model's, and the dtype of its weights."""
    from nsa.models import NSALlamaConfig
    from nsa.training.presets import PRESETS
    from nsa.training.sizes import model_config

    if name in PRESETS:
        return model_config(PRESETS[name]()), "bfloat16"
    path = Path(name) / "config.json"
    if not path.exists():
        raise ValueError(
            f"{name} holds no model: expected a folder with config.json, or a preset of {', '.join(PRESETS)}"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        kind = values.pop("model_type", None)
        stored = str(values.get("dtype") or values.get("torch_dtype") or "float32")
        is_known = kind in ("llama", NSALlamaConfig.model_type)
        config = NSALlamaConfig(**values) if is_known else None
    except Exception as error:  # transformers' checks of its fields raise nearly anything
        reason = (str(error).strip() or type(error).__name__).splitlines()
        raise ValueError(f"{path} is no model's configuration: {' '.join(reason[:2])}") from error
    if config is None:
        raise ValueError(f"{path}: expected a model of type llama or {NSALlamaConfig.model_type}, got {kind!r}")
    for size in SIZES:
        if getattr(config, size) < 1:
            raise ValueError(f"{path}: {size} should be at least 1, got {getattr(config, size)}")
    if stored not in DTYPES:
        raise ValueError(f"{path}: expected a dtype of {', '.join(DTYPES)}, got {stored!r}")
    return config, stored


def show(config: InfoConfig) -> None:
    """`nsa info`: a table, or JSON."""
    found = info(config)
    if config.json:
        print(json.dumps(found, indent=1))
    else:
        _print_table(found)


def _print_table(found: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    sparse = next(iter(found["plans"]))
    nsa, dense = found["plans"][sparse], found["plans"]["dense"]
    where = found["gpu"] or f"{found['bandwidth_gb_per_s']:g} GB/s"
    table = Table(
        title=f"{found['model']}: {found['context']:,} tokens x {found['batch']}, {found['dtype']}, {where}",
        box=box.SIMPLE,
        title_justify="left",
    )
    for column in ("", sparse, "dense", f"dense / {sparse}"):
        table.add_column(column, justify="right" if column else "left")

    def row(name: str, key: str, shown: Any) -> None:
        table.add_row(name, shown(nsa[key]), shown(dense[key]), f"{dense[key] / nsa[key]:.2f}")

    row("parameters", "parameters", _count)
    row("keys read per query", "keys_per_query", "{:,}".format)
    row("cache, bytes per token", "cache_bytes_per_token", "{:,.0f}".format)
    table.add_section()
    row("weights", "weight_bytes", _bytes)
    cache = {name: sum(one["cache_bytes"].values()) for name, one in found["plans"].items()}
    ratio = f"{cache['dense'] / cache[sparse]:.2f}"
    table.add_row("cache", _bytes(cache[sparse]), _bytes(cache["dense"]), ratio)
    for part, size in nsa["cache_bytes"].items():
        table.add_row(f"  {part}", _bytes(size), "", "")
    row(f"prefill, chunks of {found['prefill_chunk']:,}", "prefill_bytes", _bytes)
    table.add_row("a captured step's own", _bytes(nsa["packed_bytes"]), "", "")
    row("memory in all", "total_bytes", _bytes)
    table.add_section()
    row("bytes read per step", "step_bytes", _bytes)
    row("milliseconds per step, at least", "step_ms", "{:.3f}".format)
    row("tokens per second, at most", "tokens_per_second", "{:,.0f}".format)
    console = Console()
    console.print(table)
    memory = found["memory_bytes"]
    if memory is not None:
        fits = {name: one["total_bytes"] <= memory for name, one in found["plans"].items()}
        said = ", ".join(f"{name} {'fits' if ok else 'does not fit'}" for name, ok in fits.items())
        console.print(f"{where} has {_bytes(memory)}: {said}", highlight=False)


def _bytes(size: float) -> str:
    for unit, name in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size:.0f} B"


def _count(number: float) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M")):
        if number >= unit:
            return f"{number / unit:.2f} {name}"
    return f"{number:,.0f}"
