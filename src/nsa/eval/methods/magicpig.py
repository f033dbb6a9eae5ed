"""MagicPIG: keys sampled by locality-sensitive hashing, and weighed so that sums stay unbiased."""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from nsa.eval.methods.attention import dense, scores, softmax, weigh, wide
from nsa.eval.methods.budget import Split
from nsa.eval.methods.method import Method
from nsa.eval.methods.sequence import Sequence, State


@dataclass
class Tables(State):
    """Of the prompt's middle keys: their directions from the mean [g, m, d], and their codes [g, L, m]."""

    directions: Tensor
    codes: Tensor


@lru_cache(maxsize=128)  # one a layer, drawn again for no step
def projections(seed: int, dim: int, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random normal directions, [dim, count]; the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(dim, count, generator=generator, dtype=torch.float64).to(device, dtype)


@dataclass(frozen=True, kw_only=True)
class MagicPIG(Method):
    """A decode step reads an exact set and a random sample of the rest, in one softmax.

    Exact: the first `sink` and the last `local` keys of the prompt, and everything generated. The keys between are
    centred by their mean and hashed: `num_tables` tables of `num_bits` signs of random projections. One is sampled if
    it shares the query's bucket in at least two tables, which happens with

        p = 1 - arccos(cos(q, k)) / pi,   u = 1 - (1 - p^K)^L - L p^K (1 - p^K)^(L-1)

    and its logit is lowered by log u, so that the softmax's numerator and denominator are unbiased over the random
    projections. Prefill and every 16th layer from 0 on are dense. How many keys are read follows from the data, K and
    L; no vectors are read to choose, but the tables hold L codes a key.

    Source: arXiv:2410.16179, sections 4 and 5: K=10, L=150, first 4 and last 64, layers 0, 16, 32, 48.
    """

    name: ClassVar[str] = "magicpig"
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.16179"
    sparse_in: ClassVar[tuple[str, ...]] = ("decode",)

    sink: int = 4
    local: int = 64
    num_bits: int = 10
    num_tables: int = 150
    dense_every: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        self.check(sink=0, local=0, num_bits=1, num_tables=2, dense_every=0)
        if self.num_bits > 15:
            raise ValueError(f"magicpig: expected num_bits <= 15 (codes are 16-bit), got {self.num_bits}")

    @classmethod
    def at_budget(cls, split: Split) -> "MagicPIG":
        """The exact set is the budget's sinks and local tokens; the sample is as large as K and L make it."""
        return cls(sink=split.sink, local=split.local)

    def decode(self, q: Tensor, sequence: Sequence) -> Tensor:
        if self.dense_every and sequence.layer % self.dense_every == 0:
            return dense(q, sequence)
        h, n = q.shape[0], sequence.k.shape[1]
        if sequence.state is None:
            sequence.state = self.tables(sequence.k[:, : n - 1], sequence.layer)
        sampled, log_u = self.sample(q, sequence.state, sequence.layer)
        middle = slice(self.sink, self.sink + sampled.shape[1])
        allowed = torch.ones(h, 1, n, dtype=torch.bool, device=q.device)
        allowed[:, 0, middle] = sampled
        sequence.read(allowed)
        s = scores(q, sequence.k, sequence.scaling)
        s[:, 0, middle] -= log_u
        return weigh(softmax(s, allowed), sequence.v, q.dtype)

    def tables(self, k: Tensor, layer: int) -> Tables:
        """Hash the prompt's keys [g, n, d] between the exact ones."""
        prompt = k.shape[1]
        middle = wide(k[:, self.sink : max(self.sink, prompt - self.local)])
        if middle.shape[1]:
            middle = middle - middle.mean(1, keepdim=True)
        return Tables(F.normalize(middle, dim=-1), self.codes(middle, layer).transpose(1, 2).contiguous())

    def codes(self, x: Tensor, layer: int) -> Tensor:
        """[..., d] -> the bucket in every table, [..., L]: K signs of projections that depend on seed and layer."""
        count = self.num_tables * self.num_bits
        planes = projections(self.seed * 1009 + layer, x.shape[-1], count, x.dtype, x.device)
        signs = (x @ planes > 0).unflatten(-1, (self.num_tables, self.num_bits))
        powers = 2 ** torch.arange(self.num_bits, device=x.device)
        return (signs.to(x.dtype) @ powers.to(x.dtype)).to(torch.int16)  # at most 15 bits: exact in float32

    def sample(self, q: Tensor, tables: Tables, layer: int) -> tuple[Tensor, Tensor]:
        """[h, 1, d] -> which middle keys are sampled, [h, m], and the log of their chance."""
        g = len(tables.codes)
        codes = self.codes(wide(q), layer).unflatten(0, (g, -1)).mT  # g r L 1
        shared = (codes == tables.codes[:, None]).sum(-2, dtype=torch.int16).flatten(0, 1)
        cosine = scores(F.normalize(wide(q), dim=-1), tables.directions, 1.0)[:, 0]
        return shared >= 2, self.log_chance(cosine).to(cosine.dtype)

    def log_chance(self, cosine: Tensor) -> Tensor:
        """log u in float64, where the difference of nearly equal numbers still has digits."""
        p = 1 - cosine.double().clamp(-1, 1).arccos() / torch.pi
        hit, tables = p**self.num_bits, self.num_tables
        miss = torch.log1p(-hit.clamp(max=1 - 1e-15))
        at_most_one = (tables * miss).exp() + tables * hit * ((tables - 1) * miss).exp()
        return (1 - at_most_one).clamp(min=torch.finfo(torch.float64).tiny).log()
