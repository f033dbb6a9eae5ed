"""`nsa convert`: read, swap, measure, write; the new folder appears whole or not at all."""

import json
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from nsa.adapting.arguments import ConvertArguments, layer_numbers
from nsa.adapting.folder import find_model
from nsa.adapting.source import check_room, plan, read_config
from nsa.config import GATE_BIAS, InfLLMv2Config, NSAConfig
from nsa.eval.models import device_of
from nsa.eval.scoring import token_losses
from nsa.eval.text import held_out_documents
from nsa.models.swap import check_gate_bias, swap_attention
from nsa.training.loading import load_model

RECORD = "conversion.json"
SHARD = "5GB"
FUSED = re.compile(r"self_attn\.[qkv]_proj\.(weight|bias)$")  # which may be rows of a fused projection
# Of a folder's other files those that say whose the model is.
KEPT = ("LICENSE*", "NOTICE*", "README*", "USE_POLICY*")


def convert(arguments: ConvertArguments) -> None:
    """As `ConvertArguments` says."""
    source, output = find_model(arguments.dense), arguments.output
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is there and not empty; expected a new folder")
    if arguments.tokens < 0:
        raise ValueError(f"--tokens: expected 0 or more, got {arguments.tokens}")
    config, layers = read_config(source), layer_numbers(arguments.layers)
    if arguments.method != "nsa" and arguments.gate_bias != GATE_BIAS:
        raise ValueError(f"--gate-bias: --method {arguments.method} has no gates")
    _check_other_sizes(arguments, config)
    check_gate_bias(arguments.gate_bias)
    sizes = getattr(arguments, arguments.method).to_dict()
    family, planned = plan(config, arguments.method, layers, sizes)
    # A configuration may not say; then transformers looks at the weights, which have four bytes at most.
    dtype: Any = config.dtype or "auto" if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    check_room(family, planned, torch.float32 if dtype == "auto" else dtype, output)
    device = device_of(arguments.device)
    dense, tokenizer = load_model(source, dtype=dtype)
    ids = _text(arguments, tokenizer, config.max_position_embeddings)
    dense.eval()
    record: dict[str, Any] = {
        "dense": str(source.absolute()),
        "method": arguments.method,
        "layers": planned.sparse_layers,
        **({"gate_bias": arguments.gate_bias} if arguments.method == "nsa" else {}),
    }
    if ids is not None:
        before = _losses(dense, ids, device)
    given: dict[str, Any] = {arguments.method: sizes, "gate_bias": arguments.gate_bias}
    model = swap_attention(dense, arguments.method, layers=layers, **given)
    if ids is not None:
        record["loss"] = _say_losses(arguments.text, before, _losses(model, ids, device))
        model.cpu()
    with whole_folder(output) as folder:
        model.save_pretrained(folder, max_shard_size=SHARD)
        tokenizer.save_pretrained(folder)
        for pattern in KEPT:
            for file in source.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, folder / file.name)
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    _say_what_is_new(model, dense, output)


def _check_other_sizes(arguments: ConvertArguments, config: Any) -> None:
    """ValueError in one line where sizes of the method that is not made were given: nothing would read them."""
    other, kind = ("infllm_v2", InfLLMv2Config) if arguments.method == "nsa" else ("nsa", NSAConfig)
    now = getattr(arguments, other).to_dict()
    for name, value in (kind().to_dict() | (getattr(config, other, None) or {})).items():
        if now.get(name) not in (value, getattr(kind(), name, None)):
            flag = f"{other}.{name}".replace("_", "-")
            raise ValueError(f"--{flag} {now[name]}: --method {arguments.method} has no such size")


def _text(arguments: ConvertArguments, tokenizer: Any, positions: int) -> Tensor | None:
    """Tokens [1, t] of the text to measure on."""
    if not arguments.tokens:
        return None
    wanted = min(arguments.tokens, positions)
    longest: list[int] = max(held_out_documents(arguments.text, tokenizer), key=len)
    if len(longest) < 2:
        raise ValueError(f"--text {arguments.text}: no document of two tokens in it")
    return torch.tensor(longest[: wanted + 1])[None]


@torch.no_grad()
def _losses(model: Any, ids: Tensor, device: torch.device) -> Tensor:
    """Nats of every token but the first."""
    return token_losses(model.to(device), ids)[0].double()


def _say_losses(text: str, before: Tensor, after: Tensor) -> dict[str, Any]:
    """Over all positions and over the second half of them, where less is in reach."""
    record: dict[str, Any] = {"text": text, "tokens": len(before)}
    print(f"loss on {len(before):,} tokens of {text}: dense, sparse, difference")
    for name, first in (("all", 0), ("second_half", len(before) // 2)):
        one, other = (round(losses[first:].mean().item(), 4) for losses in (before, after))
        record[name] = {"dense": one, "sparse": other}
        print(f"  {'all' if not first else f'after {first:,}':<14}{one:8.4f}{other:8.4f}{other - one:+9.4f}")
    return record


def _say_what_is_new(model: Any, dense: Any, output: Path) -> None:
    held = {name for name, _ in dense.named_parameters()}
    every = {name: parameter.numel() for name, parameter in model.named_parameters()}
    new = {name: count for name, count in every.items() if name not in held and not FUSED.search(name)}
    copies = sum(count for name, count in new.items() if re.search(r"_proj_(cmp|win)\.", name))
    print(
        f"{len(model.config.sparse_layers)} of {model.config.num_hidden_layers} layers are sparse; "
        f"{sum(every.values()):,} parameters, of which {copies:,} are copies of k and v for compression and window and "
        f"{sum(new.values()) - copies:,} are new (phi and gates)"
    )
    size = sum(parameter.nbytes for parameter in model.parameters())
    print(f"wrote {output} ({size / 1e9:.2f} GB); it generates, and wins its quality back:")
    name, run = (shlex.quote(str(path)) for path in (output, Path("runs") / output.name))
    print(f"  nsa generate {name} --prompt 'Once'\n  nsa adapt {name} --out {run}")


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """A folder that is moved to its place when the block is through, and is gone if it raises."""
    output.parent.mkdir(parents=True, exist_ok=True)
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix=".nsa-convert-", dir=output.parent) as name:
        folder = Path(name) / "model"
        folder.mkdir()
        yield folder
        if output.exists():
            output.rmdir()
        os.rename(folder, output)
    sys.stdout.flush()
