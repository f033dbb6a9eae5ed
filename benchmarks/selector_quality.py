"""What a trained NSA model's choice of blocks keeps of the attention that its own queries would pay to all raw keys.

    python benchmarks/selector_quality.py runs/nsa runs/nsa-gates --length 4096 --samples 8 --output selector.json

Of the selected branch, in held-out text, for queries of the last half of a sequence, mean over layers and KV heads:

    free mass      share of attention that falls on blocks that a query is free to choose (not forced)
    kept           share of that which the chosen blocks have
    best           the same of the best n blocks: the oracle's; no choice by blocks has more
    chance         the same of n blocks drawn at random
    U4             distinct blocks that four neighbouring queries select: n if all choose alike, 4 n if no two do
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nsa.config import NSAConfig
from nsa.eval.blocks import keep
from nsa.eval.models import load, names_of
from nsa.eval.runner import text_of
from nsa.eval.tasks import Perplexity
from nsa.modules.attention import NativeSparseAttention
from nsa.modules.token_layout import TokenLayout

QUERIES = 256  # of a sequence


def main() -> None:
    parser = asking(__doc__)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--samples", type=int, default=8)
    answer(parser, compare)


def asking(about: str | None) -> argparse.ArgumentParser:
    """What every script about the choice of blocks takes."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path)
    return parser


def answer(parser: argparse.ArgumentParser, compare: Callable[[argparse.Namespace], Any]) -> None:
    """What was asked, printed and written to --output; one line for a ValueError."""
    given = parser.parse_args()
    try:
        found = compare(given)
    except ValueError as error:
        parser.error(str(error))
    if given.output is not None:
        given.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def compare(given: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Prints a line a model; the figures of every layer, by model. ValueError where there is nothing to choose."""
    text, found = text_of(given.text, given.models), {}
    for folder, name in zip(given.models, names_of(given.models), strict=True):
        candidate = load(folder, name=name, device=given.device, dtype="float32")
        if candidate.attention != "nsa":
            raise ValueError(f"{folder}: expected a model with attention='nsa', got {candidate.attention!r}")
        config = candidate.config.nsa_config
        forced = (config.num_initial_blocks + config.num_local_blocks) * config.select_block_size
        if given.length <= forced:
            raise ValueError(f"--length: expected more than the {forced} tokens of forced blocks, got {given.length}")
        task = Perplexity(length=given.length, samples=given.samples, text=text)
        layers = found[name] = of_model(candidate.model, task.sequences(candidate.tokenizer))
        mean = {figure: sum(layer[figure] for layer in layers) / len(layers) for figure in layers[0]}
        numbers = " | ".join(f"{mean[figure]:.3f}" for figure in ("free", "kept", "best", "chance"))
        each = " ".join(f"{layer['kept']:.2f}" for layer in layers)
        if len(found) == 1:
            print("| model | free mass | kept | best | chance | U4 | kept, by layer |\n|---|---|---|---|---|---|---|")
        print(f"| {name} | {numbers} | {mean['u4']:.1f} | {each} |", flush=True)
    return found


class FreeMass(NamedTuple):
    """What n queries pay to the blocks that they are free to choose, mean over the heads of a group."""

    mass: Float[Tensor, "g n blocks"]
    free: Bool[Tensor, "n blocks"]
    choices: int  # blocks of a query that are not forced

    @classmethod
    def of(
        cls, q: Float[Tensor, "t h d"], k: Float[Tensor, "t g d"], positions: Int[Tensor, " n"], config: NSAConfig
    ) -> "FreeMass":
        """Of the queries at `positions`; q and k rotated, scores scaled by d^-0.5."""
        (t, groups, _), blocks = k.shape, config.num_selection_blocks(len(k))
        some = q[positions].unflatten(1, (groups, -1)).permute(1, 2, 0, 3) * q.shape[-1] ** -0.5
        scores = some @ k.permute(1, 2, 0)[:, None]
        unseen = torch.arange(t, device=q.device) > positions[:, None]
        p = scores.masked_fill(unseen, -torch.inf).softmax(-1).mean(1)
        p = F.pad(p, (0, blocks * config.select_block_size - t)).unflatten(-1, (blocks, -1)).sum(-1)
        own, block = positions[:, None] // config.select_block_size, torch.arange(blocks, device=q.device)
        free = (block >= config.num_initial_blocks) & (block <= own - config.num_local_blocks)
        forced = config.num_initial_blocks + config.num_local_blocks
        return cls(p * free, free, config.num_selected_blocks - forced)

    def kept(self, chosen: Int[Tensor, "n g slots"]) -> float:
        """The share that these blocks have; -1 is none."""
        picked, which = torch.zeros_like(self.mass, dtype=torch.bool), chosen.transpose(0, 1).long()
        picked.scatter_(-1, which.clamp(min=0), which >= 0)
        return ((self.mass * picked).sum() / self.mass.sum()).item()

    def best(self) -> float:
        most = self.mass.topk(min(self.choices, self.mass.shape[-1]), dim=-1).values
        return (most.sum() / self.mass.sum()).item()

    def chance(self) -> float:
        return (self.choices / self.free.sum(-1).clamp(min=self.choices)).mean().item()


@torch.inference_mode()
def of_model(model: Any, rows: Tensor) -> list[dict[str, float]]:
    """The figures of every layer, mean over rows."""
    sums: list[dict[str, float]] = []
    layers = [module for module in model.modules() if isinstance(module, NativeSparseAttention)]
    for row in rows:
        inputs: dict[int, Tensor] = {}
        hooks = [layer.register_forward_pre_hook(keep(inputs, i), with_kwargs=True) for i, layer in enumerate(layers)]
        model(input_ids=row[None].to(model.device), use_cache=False, logits_to_keep=1)
        for hook in hooks:
            hook.remove()
        of_row = [of_layer(layer, inputs[i]) for i, layer in enumerate(layers)]
        sums = of_row if not sums else [{k: a[k] + b[k] for k in a} for a, b in zip(sums, of_row, strict=True)]
    return [{name: value / len(rows) for name, value in layer.items()} for layer in sums]


def of_layer(layer: NativeSparseAttention, x: Tensor) -> dict[str, float]:
    """The figures of one layer for one sequence [1, t, hidden]."""
    config, t = layer.config, x.shape[1]
    layout = TokenLayout.of(x, layer.rotary, config)
    q, tokens, _ = layer._inputs(x, layout.cos, layout.sin)
    chosen = layer.select(x)[1][0]
    positions = torch.linspace(t // 2, t - 1, QUERIES, device=x.device).long()
    paid = FreeMass.of(q[0], tokens.slc.k[0], positions, config)
    four = chosen[: t // 4 * 4].unflatten(0, (-1, 4))[t // 8 :].permute(0, 2, 1, 3).flatten(2).sort(-1).values
    distinct = (four[..., 0] >= 0).long() + (four.diff(dim=-1) > 0).sum(-1)  # -1 is none
    return {
        "free": paid.mass.sum(-1).mean().item(),
        "kept": paid.kept(chosen[positions]),
        "best": paid.best(),
        "chance": paid.chance(),
        "u4": distinct.float().mean().item(),
    }


if __name__ == "__main__":
    main()
