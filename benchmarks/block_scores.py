"""By which score NSA should choose blocks for a dense checkpoint: what the blocks so chosen keep of its own attention.

    python benchmarks/block_scores.py models/smollm2 --layers 3 13 23 --fit 8/8 16/8 16/8+var --output scores.json

The dense model's queries and keys, on held-out text. A row is a score, with the l/d of its compressed blocks and the
vectors that the last query reads to choose; a column is a layer. kept, best, chance, free mass: selector_quality.py.

    mean     q . R_i mean(k)    k before rotation, R_i the rotation of a block's first token: phi = mean, untrained
    mlp      q . R_i phi(k)     phi = mlp, fitted by the selector's own loss on text apart from what is measured on
    ... var  ... + c/2 sum over components a:  q_a^2 var_a(R k)      c = 1; fitted along with phi

All go through eqs. 8 to 10 of the paper, so that what counts is how well they give the log of a block's attention.
With q scaled by D^-0.5, mu and S the mean and the covariance of the l keys of a block,

    log sum over j: exp(q . k_j)  =  log l + q . mu + 1/2 q' S q + (third cumulants and more)

The first order is the mean's score but for the rotation within a block. Of the second, COBS (arXiv:2607.09052) keeps
the diagonal of S: a second vector beside each compressed key. Both are one product, with 2 D dims and their scale:

    (2 D)^-0.5  sqrt(2) [q, D^-0.5 q^2 / 2] . [k_cmp, c var]
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from selector_quality import QUERIES, FreeMass, answer, asking
from torch import Tensor, nn

from nsa.adapting.layers import inputs_and_outputs
from nsa.config import NSAConfig
from nsa.eval.models import load
from nsa.eval.runner import text_of
from nsa.eval.tasks import Perplexity
from nsa.models import swap_attention
from nsa.modules.compression import Compression
from nsa.modules.rotary import rotate
from nsa.modules.selector_loss import selector_loss
from nsa.modules.token_layout import TokenLayout, first_tokens
from nsa.ops.compress import blocks_of
from nsa.ops.selection import select_blocks

COMPRESS = ("32/16", "16/16", "16/8", "8/8", "8/4", "4/4")
LEARNING_RATE = 2e-3  # falls to 0 in a line


class Heads(NamedTuple):
    """A layer's of one sequence, [1, t, heads, d]: queries and keys rotated, and keys before rotation."""

    q: Tensor
    k: Tensor
    k_raw: Tensor
    layout: TokenLayout

    @classmethod
    @torch.no_grad()
    def of(cls, attention: Any, x: Tensor) -> "Heads":
        layout = TokenLayout.of(x, attention.rotary, attention.config)
        q, tokens, _ = attention._inputs(x, layout.cos, layout.sin)
        return cls(q, tokens.slc.k, tokens.cmp.k, layout)


class Score(nn.Module):
    """phi: a kind of `Compression`; blocks: l/d, or l/d+var for the second order; select: l'/n."""

    def __init__(self, phi: str, blocks: str, select: str, like: Tensor) -> None:
        super().__init__()
        sizes, self.second = blocks.removesuffix("+var"), blocks.endswith("+var")
        self.name = f"{phi}{' + var' * self.second}, {sizes}"
        self.config = NSAConfig(
            **pair(sizes, "compress_block_size", "compress_stride"),
            **pair(select, "select_block_size", "num_selected_blocks"),
        )
        self.phi = Compression(len(like), NSAConfig(**self.config.to_dict() | {"compression": phi}))
        self.c = nn.Parameter(torch.ones(()))
        self.to(like)

    def forward(self, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and k_cmp of which `selector_loss` and `select_blocks` make this score."""
        q, k, k_raw, layout = heads
        cos, sin = (first_tokens(x, self.config) for x in (layout.cos, layout.sin))
        k_cmp = rotate(self.phi(blocks_of(k_raw, self.config)), cos, sin)
        if not self.second:
            return q, k, k_cmp
        var = blocks_of(k, self.config).var(-2, correction=0)
        q = 2**0.5 * torch.cat([q, q.square() * (q.shape[-1] ** -0.5 / 2)], -1)
        return q, torch.cat([k, torch.zeros_like(k)], -1), torch.cat([k_cmp, self.c * var], -1)

    def fit(self, sequences: Sequence[Heads], steps: int) -> "Score":
        optimizer = torch.optim.AdamW(self.parameters(), LEARNING_RATE, weight_decay=0.0)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / steps)
            heads = sequences[step % len(sequences)]
            optimizer.zero_grad()
            selector_loss(*self(heads), heads.layout, self.config).backward()
            optimizer.step()
        return self

    @torch.no_grad()
    def choose(self, heads: Heads, positions: Tensor) -> Tensor:
        """The blocks [n, g, slots] of the queries at `positions`, which lie in the last half."""
        q, k, k_cmp = self(heads)
        half = q.shape[1] // 2
        return select_blocks(q[:, half:], k_cmp, self.config, num_keys=k.shape[1])[0, positions - half]


def main() -> None:
    parser = asking(__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--layers", type=int, nargs="+", required=True)
    parser.add_argument("--select", nargs="+", default=["32/16", "64/10"], help="l'/n; of the first, scores are fitted")
    parser.add_argument("--compress", nargs="+", default=COMPRESS, help="l/d, untrained, without and with the variance")
    parser.add_argument("--fit", nargs="+", default=[], help="l/d or l/d+var of phi = mlp")
    parser.add_argument("--steps", type=int, default=150, help="of a fit, a sequence each")
    parser.add_argument("--samples", type=int, default=4, help="sequences that are measured on")
    parser.add_argument("--fit-samples", type=int, default=12, help="those that are fitted on, before them in the text")
    parser.add_argument("--dtype", default="float32")
    answer(parser, compare)


def compare(given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Prints a table for each of `select`; by l'/n and row, the vectors read and each layer's figure."""
    if min(given.samples, given.fit_samples) < 1:
        raise ValueError(f"--samples, --fit-samples: expected 1 or more, got {given.samples} and {given.fit_samples}")
    candidate = load(given.model, name="dense", device=given.device, dtype=given.dtype)
    sparse = swap_attention(candidate.model, layers=given.layers, nsa={"compression": "mean", "shared_kv": True})
    attentions = {number: sparse.model.layers[number].self_attn for number in sparse.config.sparse_layers}
    first = next(iter(attentions.values()))
    like = first.k_proj.weight.new_empty(first.head_dim)

    def scores(select: str, phi: str, names: Sequence[str]) -> list[Score]:
        torch.manual_seed(0)
        return [Score(phi, name, select, like) for name in names]

    untrained = [name + var for name in given.compress for var in ("", "+var")]
    means = {select: scores(select, "mean", untrained) for select in given.select}
    scores(given.select[0], "mlp", given.fit)  # what cannot be is told before anything runs
    for select in given.select:
        check(means[select][0].config, given.length)
    source, samples = text_of(given.text, [given.model]), given.samples + given.fit_samples
    rows = Perplexity(length=given.length, samples=samples, text=source).sequences(candidate.tokenizer)
    inputs = inputs_of(candidate.model, list(attentions), rows if given.fit else rows[given.fit_samples :])
    found: dict[str, dict[str, Any]] = {select: {} for select in given.select}
    for number, attention in attentions.items():
        heads = [Heads.of(attention, x) for x in inputs.pop(number)]
        for select in given.select:
            fitted = scores(select, "mlp", given.fit if select == given.select[0] else [])
            here = means[select] + [score.fit(heads[: given.fit_samples], given.steps) for score in fitted]
            for name, value in figures(heads[-given.samples :], here).items():
                found[select].setdefault(name, {"layers": []})["layers"].append(value)
            for score in here:
                count = score.config.num_compressed_blocks(given.length)
                found[select][score.name]["vectors"] = count * (1 + score.second)
    for select, of_select in found.items():
        titles = " | ".join(f"layer {number}" for number in attentions)
        print(f"\n| l'/n = {select} | vectors read | {titles} |\n|---|---|{'---|' * len(attentions)}")
        for name, row in of_select.items():
            print(f"| {name} | {row.get('vectors', '')} | {' | '.join(f'{value:.3f}' for value in row['layers'])} |")
    return found


@torch.no_grad()
def inputs_of(dense: Any, layers: list[int], rows: Tensor) -> dict[int, list[Tensor]]:
    """What the attention of these layers is given, [1, t, hidden] for each row."""
    found: dict[int, list[Tensor]] = {number: [] for number in layers}
    for row in rows:
        with inputs_and_outputs(dense, layers) as seen:
            dense.model(input_ids=row[None].to(dense.device), use_cache=False)
        for number, (x, _) in seen.items():
            found[number].append(x)
    return found


def figures(sequences: Sequence[Heads], scores: Sequence[Score]) -> dict[str, float]:
    """By name, mean over sequences; the first three are those of any score."""
    rows = []
    for heads in sequences:
        t = heads.q.shape[1]
        positions = torch.linspace(t // 2, t - 1, QUERIES, device=heads.q.device).long()
        paid = FreeMass.of(heads.q[0], heads.k[0], positions, scores[0].config)
        rows.append({"free mass": paid.mass.sum(-1).mean().item(), "best": paid.best(), "chance": paid.chance()})
        rows[-1] |= {score.name: paid.kept(score.choose(heads, positions)) for score in scores}
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def check(config: NSAConfig, length: int) -> None:
    """ValueError where there is nothing to choose."""
    forced = config.num_initial_blocks + config.num_local_blocks
    if config.num_selected_blocks == forced:
        raise ValueError(f"--select: expected n above the {forced} blocks that are forced, got {forced}")
    if length <= (tokens := forced * config.select_block_size):
        raise ValueError(f"--length: expected more than the {tokens} tokens of forced blocks, got {length}")


def pair(text: str, *names: str) -> dict[str, int]:
    numbers = text.split("/")
    if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
        raise ValueError(f"expected two numbers as in 16/8, got {text!r}")
    return dict(zip(names, map(int, numbers), strict=True))


if __name__ == "__main__":
    main()
