"""Which choice of blocks lets a question find its needle: InfLLM-V2 laid over a dense checkpoint, without training.

    python benchmarks/pooled_choice.py models/smollm2 --length 4096 --choices 32/16/64/8 8/8/64/8 mass/64/8 --window 512

A choice is kernel/stride/block_size/topk of `InfLLMv2Config` (blocks by keys pooled by their mean), or one of

    mass/block_size/topk         the exact attention that a block's keys get
    bound/page/block_size/topk   as means, but a page scores what no key of it can exceed: the sum over components of
                                 max(q_i min k_i, q_i max k_i)  (Quest, arXiv:2406.10774)
    var/page/block_size/topk     as means, and half the variance of a page's scores, of each component by itself (COBS)

The text is read once, densely; question and
answer are then read by every choice from the same keys and values, with the library's own lists of blocks. So the
figures tell of the choice alone, where keys and values are what dense attention made them.

    needles   answers right in every token, as `nsa eval --tasks needle` has it (its prompts)
    kept      of the dense attention of question and answer to the blocks that hold the needle's value, the share that
              goes to listed blocks; over all layers and heads, of the needles that no forced block holds
    mass      the same of the attention of these to all blocks
    loss      nats a token over the last `--last` tokens of rows of text
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from selector_quality import answer, asking
from torch import Tensor
from torch.nn.functional import cross_entropy, pad, scaled_dot_product_attention
from transformers import AttentionInterface, DynamicCache

from nsa.config import InfLLMv2Config
from nsa.eval.models import load
from nsa.eval.prompts import Prompt
from nsa.eval.runner import text_of
from nsa.eval.tasks import Needle, Perplexity
from nsa.ops.compress import compress, phi_mean
from nsa.ops.pooled_selection import select_by_mass, select_by_pooled_keys
from nsa.ops.selection import top_blocks

NAME = "pooled_choice"


KINDS = {"dense": 0, "mass": 2, "bound": 3, "var": 3, "mean": 4}  # numbers in a name


class Choice:
    """One row of the table."""

    def __init__(self, name: str, window: int) -> None:
        self.name, self.kind = name, name.split("/")[0] if name[:1].isalpha() else "mean"
        numbers = [int(x) for x in name.split("/") if x.isdecimal()]
        if len(numbers) != KINDS.get(self.kind, -1):
            raise ValueError(f"--choices: expected kernel/stride/block/topk, mass/block/topk, .., got {name!r}")
        pooled = numbers[:-2] if self.kind == "mean" else [1, 1] if self.kind == "mass" else numbers[:1] * 2
        sizes = dict(zip(("kernel_size", "kernel_stride", "block_size", "topk"), pooled + numbers[-2:], strict=False))
        self.config = InfLLMv2Config(**sizes, window_size=window, dense_len=0) if numbers else None
        self.right: dict[float, list[bool]] = {}
        self.losses: list[float] = []
        self.paid = torch.zeros(4, dtype=torch.float64)  # to the needle's blocks: all, listed; to all blocks: the same
        self.span: tuple[int, int] | None = None  # of the needle's value

    def visible(self, q: Tensor, k: Tensor) -> Tensor:
        """Which keys the last queries see, bool [1, h, t, s], of q [1, t, h, d] and k [1, s, g, d]."""
        t, (s, g) = q.shape[1], k.shape[1:3]
        keys = torch.arange(s, device=q.device)
        causal = keys <= torch.arange(s - t, s, device=q.device)[:, None]
        if self.config is None:
            return causal[None, None]
        if self.kind == "mass":
            lists = select_by_mass(q, k, self.config)
        elif self.kind != "mean":
            lists = by_pages(self.kind, q, k, self.config)
        else:
            lists = select_by_pooled_keys(q, compress(k, phi_mean, self.config.blocks), self.config, num_keys=s)
        listed = torch.zeros(t, g, -(-s // self.config.block_size) + 1, dtype=torch.bool, device=q.device)
        listed = listed.scatter(-1, lists[0].long() % listed.shape[-1], True)  # -1: one that there is not
        seen = listed[..., keys // self.config.block_size] & causal[:, None]
        seen = seen.transpose(0, 1).repeat_interleave(q.shape[2] // g, 0)
        if self.span is not None:
            heads = k[0].transpose(0, 1).repeat_interleave(q.shape[2] // g, 0)
            scores = q[0].transpose(0, 1) @ heads.transpose(1, 2) * q.shape[-1] ** -0.5
            p = scores.masked_fill(~causal, -torch.inf).softmax(-1).double()
            first, last = (x // self.config.block_size for x in (self.span[0], self.span[1] - 1))
            there = (keys // self.config.block_size >= first) & (keys // self.config.block_size <= last)
            forced = self.config.block_size, s - t - self.config.blocks.num_local_blocks * self.config.block_size
            if forced[0] <= self.span[0] and self.span[1] <= forced[1]:
                self.paid += torch.stack([(p * there).sum(), (p * there * seen).sum(), p.sum(), (p * seen).sum()]).cpu()
        return seen[None]

    def row(self) -> str:
        found = [x for right in self.right.values() for x in right]
        cells = " | ".join(f"{sum(right)}" for right in self.right.values())
        kept = "" if self.config is None else f"{self.paid[1] / self.paid[0]:.3f}"
        mass = "" if self.config is None else f"{self.paid[3] / self.paid[2]:.3f}"
        loss = f"{sum(self.losses) / len(self.losses):.4f}" if self.losses else ""
        return f"| {self.name} | {sum(found)} of {len(found)} | {cells} | {kept} | {mass} | {loss} |"


def by_pages(kind: str, q: Tensor, k: Tensor, config: InfLLMv2Config) -> Tensor:
    """`select_by_pooled_keys` of pages, by their keys' bounds or their mean and variance."""
    (_, t, _, d), (_, s, g, _), size = q.shape, k.shape, config.kernel_size
    positions = torch.arange(s - t, s, device=q.device)
    pages = k[:, : s // size * size].unflatten(1, (-1, size)).permute(0, 3, 1, 2, 4)  # [1, g, pages, size, d]
    heads = q.unflatten(2, (g, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3) * d**-0.5  # [1, g, heads t, d]
    if kind == "bound":
        least, most = pages.amin(-2), pages.amax(-2)
        scores = heads.relu() @ most.mT - (-heads).relu() @ least.mT
    else:
        scores = heads @ pages.mean(-2).mT + heads.square() @ pages.var(-2, correction=0).mT / 2
    scores = scores.unflatten(2, (-1, t))
    ends = torch.arange(1, pages.shape[2] + 1, device=q.device) * size - 1
    weights = scores.masked_fill(ends > positions[:, None], -torch.inf).softmax(-1).sum(2)
    per_block = config.block_size // size
    of_blocks = pad(weights, (0, -weights.shape[-1] % per_block)).unflatten(-1, (-1, per_block)).amax(-1)
    return top_blocks(of_blocks, positions, config.blocks).transpose(1, 2)


def main() -> None:
    parser = asking(__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--choices", nargs="+", required=True)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--depths", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75, 1.0])
    parser.add_argument("--samples", type=int, default=4, help="needles a depth")
    parser.add_argument("--rows", type=int, default=4, help="of text, for the loss")
    parser.add_argument("--last", type=int, default=256, help="tokens of a row that the choices read")
    parser.add_argument("--dtype", default="float32")
    answer(parser, measure)


@torch.no_grad()
def measure(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Prints the table after every needle's sample and at the end; the figures of every choice."""
    choices = [Choice(name, given.window) for name in ("dense", *given.choices)]
    candidate = load(given.model, name="dense", device=given.device, dtype=given.dtype)
    model, tokenizer, text = candidate.model, candidate.tokenizer, text_of(given.text, [given.model])
    rows = Perplexity(length=given.length, samples=given.rows, text=text).sequences(tokenizer) if given.rows else ()
    for number, row in enumerate(rows):
        ids = row[None].to(model.device)
        with read(model, ids[:, : -given.last - 1]) as after:
            for choice in choices:
                logits = after(choice, ids[:, -given.last - 1 : -1])
                choice.losses.append(cross_entropy(logits, ids[0, -given.last :]).item())
        print(f"row {number}: " + ", ".join(f"{c.name} {c.losses[-1]:.4f}" for c in choices), flush=True)
    task = Needle(lengths=(given.length,), depths=tuple(given.depths), samples=given.samples, text=text)
    prompts = {depth: task.prompts(tokenizer, given.length, depth) for depth in given.depths}
    for sample in range(given.samples):
        for depth in given.depths:
            _ask(model, prompts[depth][sample], depth, choices)
        print(
            f"sample {sample}: " + ", ".join(f"{c.name} {[r[-1] for r in c.right.values()]}" for c in choices),
            flush=True,
        )
    depths = " | ".join(f"at {depth:g}" for depth in given.depths)
    print(f"\n| choice | needles | {depths} | kept | mass | loss |\n|{'---|' * (5 + len(given.depths))}")
    for choice in choices:
        print(choice.row())
    return [
        {
            "choice": c.name,
            "right": {str(d): r for d, r in c.right.items()},
            "paid": c.paid.tolist(),
            "losses": c.losses,
        }
        for c in choices
    ]


def _ask(model: Any, prompt: Prompt, depth: float, choices: list[Choice]) -> None:
    ids = torch.tensor([prompt.tokens + prompt.answer[:-1]], device=model.device)
    said, late = torch.tensor(prompt.answer, device=model.device), prompt.question + len(prompt.answer) - 1
    with read(model, ids[:, :-late]) as after:
        for choice in choices:
            choice.span = prompt.needle
            logits = after(choice, ids[:, -late:])[-len(said) :]
            choice.span = None
            choice.right.setdefault(depth, []).append(bool((logits.argmax(-1) == said).all()))


@contextmanager
def read(model: Any, ids: Tensor) -> Iterator[Any]:
    """Read `ids` densely; inside, the logits [t, v] of tokens after them, as a choice reads."""
    cache = DynamicCache(config=model.config)
    before = model.config._attn_implementation
    model(input_ids=ids, past_key_values=cache, logits_to_keep=1)

    reading: list[Choice] = []

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
        seen = reading[0].visible(q.transpose(1, 2), k.transpose(1, 2))
        out = scaled_dot_product_attention(q, k, v, seen, scale=kwargs.get("scaling"), enable_gqa=True)
        return out.transpose(1, 2), None

    def after(choice: Choice, more: Tensor) -> Tensor:
        reading[:] = [choice]
        logits = model(input_ids=more, past_key_values=cache).logits[0]
        cache.crop(-more.shape[1])
        return logits

    AttentionInterface.register(NAME, attend)
    try:
        model.set_attn_implementation(NAME)
        yield after
    finally:
        model.set_attn_implementation(before)


if __name__ == "__main__":
    main()
