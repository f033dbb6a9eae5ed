"""MInference: sparse prefill by three patterns, one for each head."""

from collections.abc import Sequence as Numbers
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nsa.eval.methods.attention import attend, causal, chunks, dense, scores, softmax, top, wide
from nsa.eval.methods.budget import Split
from nsa.eval.methods.method import Method
from nsa.eval.methods.sequence import Sequence

PATTERNS = ("a_shape", "vertical_slash", "block_sparse")


@dataclass(frozen=True, kw_only=True)
class MInference(Method):
    """In prefill each head has one of three patterns; decode is dense.

        a_shape         the first `a_sink` tokens and the last `a_local`
        vertical_slash  softmax of the last `last_queries` queries over all keys; the `num_vertical` columns and the
                        `num_slash` diagonals of greatest sum, the first `forced_vertical` columns and the last
                        `forced_slash` offsets always among them
        block_sparse    q and k averaged over blocks of `block_size`; each block of queries reads the `num_blocks`
                        key blocks of greatest score

    `prepare` compares the three with dense attention on a sample and gives each head that of least error; without
    it every head is vertical_slash.

    Args:
        patterns: for each layer the pattern of each head; () for vertical_slash everywhere.

    Source: arXiv:2407.02490, section 3 and its code: (1000, 6096), 64 queries, 30 and 100 forced, blocks of 64, 100
    blocks. The A-shape's sizes here have the same total.
    """

    name: ClassVar[str] = "minference"
    paper: ClassVar[str] = "https://arxiv.org/abs/2407.02490"
    sparse_in: ClassVar[tuple[str, ...]] = ("prefill",)

    num_vertical: int = 1000
    num_slash: int = 6096
    forced_vertical: int = 30
    forced_slash: int = 100
    last_queries: int = 64
    block_size: int = 64
    num_blocks: int = 100
    a_sink: int = 1000
    a_local: int = 6096
    patterns: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        self.check(num_vertical=0, num_slash=1, last_queries=1, block_size=1, num_blocks=1, a_sink=0, a_local=1)
        unknown = {pattern for layer in self.patterns for pattern in layer} - set(PATTERNS)
        if unknown:
            raise ValueError(f"minference: patterns are {', '.join(PATTERNS)}; got {', '.join(sorted(unknown))}")

    @classmethod
    def at_budget(cls, split: Split) -> "MInference":
        """Sinks are forced columns, local tokens forced offsets; the rest is divided as 1000 : 6096."""
        vertical = round(split.chosen * cls.num_vertical / (cls.num_vertical + cls.num_slash))
        return cls(
            num_vertical=split.sink + vertical,
            num_slash=split.total - split.sink - vertical,
            forced_vertical=split.sink,
            forced_slash=split.local,
            num_blocks=-(-split.total // cls.block_size),
            a_sink=split.sink,
            a_local=split.total - split.sink,
        )

    def prepare(self, model: nn.Module, tokens: Numbers[int]) -> "MInference":
        """The pattern search, on one sample (the paper's: one of 30k tokens from a retrieval task)."""
        from nsa.eval.methods.cache import MethodCache, attached

        found: dict[int, tuple[str, ...]] = {}
        with attached(model), torch.inference_mode():
            device = next(model.parameters()).device
            cache = MethodCache(_Search(candidate=replace(self, patterns=()), found=found), model)
            model(input_ids=torch.tensor([list(tokens)], device=device), past_key_values=cache, logits_to_keep=1)
        return replace(self, patterns=tuple(found[layer] for layer in sorted(found)))

    def prefill(self, q: Tensor, sequence: Sequence) -> Tensor:
        h, t, _ = q.shape
        n = sequence.k.shape[1]
        names = self.patterns[sequence.layer] if self.patterns else ("vertical_slash",) * h
        heads = {p: torch.tensor([i for i, name in enumerate(names) if name == p], device=q.device) for p in set(names)}
        vertical = slash = blocks = None
        if "vertical_slash" in heads:
            vertical, slash = self.vertical_slash(q, sequence)
        if "block_sparse" in heads:
            blocks = self.blocks(q, sequence)
        parts = []
        for first, last in chunks(q, n):
            visible = causal(t, n, q.device, first, last)
            m = visible.shape[1]
            keys = torch.arange(m, device=q.device)
            own = keys[n - t + first :, None]
            allowed = visible.repeat(h, 1, 1)
            if "a_shape" in heads:
                allowed[heads["a_shape"]] &= (keys < self.a_sink) | (keys > own - self.a_local)
            if vertical is not None and slash is not None:
                rows = heads["vertical_slash"]
                diagonals = slash[rows, :m].flip(-1)  # column c is the offset m - 1 - c: a query's own row, moved
                diagonals = F.pad(diagonals, (0, last - first - 1)).unfold(-1, m, 1).flip(1)
                allowed[rows] &= vertical[rows, None, :m] | diagonals
            if blocks is not None:
                rows = heads["block_sparse"]
                of_query = (own[:, 0] // self.block_size) - (n - t) // self.block_size
                of_key = blocks[rows].repeat_interleave(self.block_size, -1)[..., :m]
                allowed[rows] &= of_key[:, of_query]
            parts.append(attend(q[:, first:last], sequence, allowed))
        return torch.cat(parts, dim=1)

    def vertical_slash(self, q: Tensor, sequence: Sequence) -> tuple[Tensor, Tensor]:
        """Which columns and which offsets i - j each head reads: two masks [h, n]."""
        (h, t, _), n = q.shape, sequence.k.shape[1]
        last = min(self.last_queries, t)
        visible = causal(t, n, q.device, t - last, t)
        p = softmax(scores(q[:, t - last :], sequence.k, sequence.scaling), visible)
        columns = p.sum(1)
        offset = (torch.arange(n - last, n, device=q.device)[:, None] - torch.arange(n, device=q.device)).clamp(min=0)
        diagonals = torch.zeros_like(columns).scatter_add_(1, offset.expand(h, -1, -1).flatten(1), p.flatten(1))
        columns[:, : self.forced_vertical] = torch.inf
        diagonals[:, : self.forced_slash] = torch.inf
        sequence.read(0.0, float(n * last))
        return top(columns, self.num_vertical), top(diagonals, self.num_slash)

    def blocks(self, q: Tensor, sequence: Sequence) -> Tensor:
        """Which key blocks each block of these queries reads, [h, query blocks, key blocks]."""
        t, n = q.shape[1], sequence.k.shape[1]
        size, positions = self.block_size, torch.arange(n, device=q.device)
        first = (n - t) // size
        q_mean = _means(q, positions[n - t :] // size - first)
        k_mean = _means(sequence.k, positions // size)
        s = scores(q_mean, k_mean, sequence.scaling)
        query_blocks = first + torch.arange(q_mean.shape[1], device=q.device)
        past = torch.arange(k_mean.shape[1], device=q.device) <= query_blocks[:, None]
        sequence.read(0.0, past.sum())
        return top(s.masked_fill(~past, -torch.inf), self.num_blocks)


@dataclass(frozen=True, kw_only=True)
class _Search(Method):
    """Dense, noting for each head which pattern comes closest."""

    name: ClassVar[str] = "minference_search"
    paper: ClassVar[str] = MInference.paper

    candidate: MInference
    found: dict[int, tuple[str, ...]] = field(compare=False)

    def prefill(self, q: Tensor, sequence: Sequence) -> Tensor:
        truth = dense(q, sequence)
        errors = []
        for pattern in PATTERNS:
            tried = replace(self.candidate, patterns=((pattern,) * len(q),) * (sequence.layer + 1))
            errors.append((wide(tried.prefill(q, sequence)) - wide(truth)).square().sum((1, 2)))
        self.found[sequence.layer] = tuple(PATTERNS[i] for i in torch.stack(errors).argmin(0).tolist())
        return truth


def _means(x: Tensor, block: Tensor) -> Tensor:
    """[h, t, d], ascending block numbers [t] from 0 -> the mean of every block, [h, blocks, d]."""
    blocks = int(block[-1]) + 1
    sums = wide(x).new_zeros(x.shape[0], blocks, x.shape[2]).index_add_(1, block, wide(x))
    return sums / torch.bincount(block, minlength=blocks)[:, None]
