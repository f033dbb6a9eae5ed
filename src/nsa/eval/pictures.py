"""What the report shows of a model's inside, gathered as plain numbers: selected blocks, keys read, curves."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nsa.config import InfLLMv2Config, NSAConfig
from nsa.eval.blocks import LayerSelection, counted_keys, keys_per_query, limits_of_dense_layers, selections_of
from nsa.eval.files import read_records
from nsa.eval.models import Candidate
from nsa.eval.prompts import Prompt
from nsa.eval.result import Result
from nsa.eval.tasks import Needle
from nsa.eval.text import held_out_texts
from nsa.methods.registry import Attention

SAMPLE_TOKENS = 240
# Losses as the trainer names them, and what a chart of each is called.
CURVES = {
    "loss": "While training",
    "eval_text_loss": "On held-out text",
    "eval_retrieval_loss": "On values to be recalled",
}


@dataclass(frozen=True, kw_only=True)
class Head:
    """One layer and KV head group for the pictured query."""

    name: str
    scores: list[float]
    selected: list[int]
    forced: list[int]


@dataclass(frozen=True, kw_only=True)
class BlockPicture:
    """The last query of one prompt, in every layer and group, and the prompt's text token by token."""

    model: str
    pieces: list[str]
    needle: tuple[int, int]
    answer: str
    window_size: int
    block_size: int
    heads: list[Head]

    @property
    def counts(self) -> list[int]:
        """Per block, how many layers and groups selected it by score (forced ones do not count)."""
        blocks = range(-(-len(self.pieces) // self.block_size))
        return [sum(b in head.selected and b not in head.forced for head in self.heads) for b in blocks]

    @property
    def found(self) -> int:
        """How many layers and groups selected a block that holds a part of the needle."""
        first, last = self.needle[0] // self.block_size, (self.needle[1] - 1) // self.block_size
        return sum(any(first <= block <= last for block in head.selected) for head in self.heads)


@dataclass(frozen=True, kw_only=True)
class KeysRead:
    """Keys one query reads, counted in the model at a few contexts; the formula needs only the configuration.

    `sparse` is the number of its layers with the method, and `dense` has the most keys that each of the others reads.
    """

    model: str
    config: NSAConfig | InfLLMv2Config
    contexts: list[int]
    counted: list[float]
    sparse: int = 1
    dense: tuple[int, ...] = ()

    @property
    def attention(self) -> Attention:
        return "infllm_v2" if isinstance(self.config, InfLLMv2Config) else "nsa"

    def formula(self, attention: str, context: int) -> float:
        """Those of a twin; of the model's own method the mean over its layers."""
        keys = keys_per_query(attention, self.config, context)
        if attention != self.attention or not self.dense:
            return keys
        return statistics.fmean([*[keys] * self.sparse, *(min(most, context) for most in self.dense)])


@dataclass(kw_only=True)
class Curve:
    """Losses by training step, for each of CURVES that was recorded."""

    losses: dict[str, dict[int, float]] = field(default_factory=dict)
    seconds_per_step: float | None = None


def look_inside(candidate: Candidate, prompt: Prompt) -> tuple[BlockPicture, KeysRead] | None:
    """Both pictures of a sparse model from one forward pass over the prompt; None for a model without such layers."""
    layers = selections_of(candidate.model, prompt.tokens)
    if not layers:
        return None
    config = layers[0].config
    picture = BlockPicture(
        model=candidate.name,
        pieces=pieces_of(candidate.tokenizer, prompt.tokens),
        needle=prompt.needle,
        answer=candidate.tokenizer.decode(prompt.answer),
        window_size=(layers[0].infllm_v2 or config).window_size,
        block_size=config.select_block_size,
        heads=_heads(layers, len(prompt.tokens) - 1),
    )
    contexts = [2**e for e in range(5, 31) if 2**e < len(prompt.tokens)] + [len(prompt.tokens)]
    dense = [limits_of_dense_layers(candidate.config, context) for context in contexts]
    counted = [counted_keys(layers, context - 1, keys) for context, keys in zip(contexts, dense, strict=True)]
    read = KeysRead(
        model=candidate.name,
        config=layers[0].infllm_v2 or config,
        contexts=contexts,
        counted=counted,
        sparse=len(layers),
        dense=tuple(limits_of_dense_layers(candidate.config, 2**62)),
    )
    return picture, read


def picture_prompt(candidates: Sequence[Candidate], result: Result) -> Prompt | None:
    """The needle prompt to look into: the longest, about a third down, if possible one that the NSA model solved."""
    if Needle.name not in result.tasks or not candidates:
        return None
    parameters: dict[str, Any] = result.tasks[Needle.name]
    arguments: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in parameters.items()}
    task = Needle(**arguments)
    length, depth = max(task.lengths), min(task.depths, key=lambda depth: abs(depth - 0.3))
    candidate = next((c for c in candidates if c.attention == "nsa"), candidates[0])
    row = next(
        row for row in result.of_task(candidate.name, Needle.name) if row.where == {"length": length, "depth": depth}
    )
    solved = row.values.index(1.0) if 1.0 in row.values else 0
    return task.prompts(candidate.tokenizer, length, depth)[solved]


def continuation(candidate: Candidate, text: str) -> tuple[str, str]:
    """A held-out document's beginning, and how the model goes on (sampled at temperature 0.7, of one seed)."""
    beginning = max(held_out_texts(text), key=len)[:240]
    beginning = beginning[: beginning.rfind("\n") + 1] or beginning
    tokens = candidate.tokenizer(beginning, add_special_tokens=False, return_tensors="pt")["input_ids"]
    positions = getattr(candidate.model.config, "max_position_embeddings", None) or SAMPLE_TOKENS + tokens.shape[1]
    tokens = tokens[:, : max(1, positions - SAMPLE_TOKENS)]
    torch.manual_seed(0)
    out = candidate.model.generate(  # type: ignore[operator]
        tokens.to(candidate.model.device), max_new_tokens=SAMPLE_TOKENS, do_sample=True, temperature=0.7, top_k=0
    )
    return beginning, candidate.tokenizer.decode(out[0, tokens.shape[1] :], skip_special_tokens=True)


def read_curve(folder: Path) -> Curve:
    """The losses that the trainer wrote beside the model; an empty curve where there are none."""
    curve = Curve()
    for record in read_records(folder / "metrics.jsonl"):
        step, seconds = record.get("step"), record.get("seconds")
        if not isinstance(step, int):
            continue
        for name in CURVES.keys() & record.keys():
            value = record[name]
            curve.losses.setdefault(name, {})[step] = value if isinstance(value, float | int) else math.nan
        if step and isinstance(seconds, float | int):
            curve.seconds_per_step = seconds / step
    return curve


def pieces_of(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """The text of every token; a character of several tokens is shown at its last one."""
    pieces, pending = [], []
    for token in tokens:
        pending.append(token)
        text = tokenizer.decode(pending)
        if text.endswith("\ufffd") and len(pending) < 4:  # the middle of a character of UTF-8
            pieces.append("")
            continue
        pieces.append(text)
        pending = []
    return pieces


def _heads(layers: Sequence[LayerSelection], position: int) -> list[Head]:
    return [
        Head(
            name=f"layer {index + 1}" + (f" · group {group + 1}" if layer.num_groups > 1 else ""),
            scores=layer.block_scores[position, group].tolist(),
            selected=layer.selected(position, group),
            forced=layer.forced(position),
        )
        for index, layer in enumerate(layers)
        for group in range(layer.num_groups)
    ]
