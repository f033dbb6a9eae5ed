"""ClusterKV: keys clustered by direction, read a cluster at a time."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from nsa.eval.methods.attention import attend, dense, wide
from nsa.eval.methods.budget import Split
from nsa.eval.methods.method import Method
from nsa.eval.methods.sequence import Sequence, State


@dataclass
class Clusters(State):
    """Of the keys from the sinks up to `end`: their cluster [g, m]; centroids [g, c, d] and sizes [g, c]."""

    labels: Tensor
    centroids: Tensor
    sizes: Tensor
    end: int


@dataclass(frozen=True, kw_only=True)
class ClusterKV(Method):
    """A decode step reads the first `sinks` keys, `budget` keys of the best clusters, and what was generated.

    After the prompt, k-means of each KV head's keys but the sinks: cosine similarity, `iterations` rounds, one
    cluster for `keys_per_cluster` keys. Each query head ranks the clusters by q . centroid (the mean key) and takes
    them whole until the budget, the last one cut. Generated keys are all read, until `recluster` of them are
    clustered too. Prefill and the first `dense_layers` layers are dense. One vector a cluster is read to choose.

    Source: arXiv:2412.03213, section 3 and its code: 16 sinks, L/80 clusters, 20 iterations, every 320 steps. The
    first centres here are keys at equal distances, so that a run can be repeated.
    """

    name: ClassVar[str] = "clusterkv"
    paper: ClassVar[str] = "https://arxiv.org/abs/2412.03213"
    sparse_in: ClassVar[tuple[str, ...]] = ("decode",)

    sinks: int = 16
    budget: int = 2544
    keys_per_cluster: int = 80
    iterations: int = 20
    recluster: int = 320
    dense_layers: int = 2

    def __post_init__(self) -> None:
        self.check(sinks=0, budget=0, keys_per_cluster=1, iterations=1, recluster=1, dense_layers=0)

    @classmethod
    def at_budget(cls, split: Split) -> "ClusterKV":
        sinks = min(cls.sinks, split.total // 2)
        return cls(sinks=sinks, budget=split.total - sinks)

    def decode(self, q: Tensor, sequence: Sequence) -> Tensor:
        if sequence.layer < self.dense_layers:
            return dense(q, sequence)
        (h, _, _), (g, n, _) = q.shape, sequence.k.shape
        self._cluster_new(sequence)
        allowed = torch.ones(h, 1, n, dtype=torch.bool, device=q.device)
        state = sequence.state
        if state is not None:
            sequence.read(0.0, (state.sizes > 0).sum() / g)
            allowed[:, 0, self.sinks : state.end] = self.chosen(q, state)
        return attend(q, sequence, allowed)

    def chosen(self, q: Tensor, state: Clusters) -> Tensor:
        """[h, 1, d] -> which of the clustered keys each head reads, [h, m]."""
        queries = wide(q)[:, 0].unflatten(0, (len(state.labels), -1))  # g r d
        relevance = (queries @ state.centroids.mT).flatten(0, 1)  # h c
        order = relevance.argsort(dim=-1, descending=True, stable=True)
        r = q.shape[0] // len(state.labels)
        labels, sizes = state.labels.repeat_interleave(r, 0), state.sizes.repeat_interleave(r, 0)
        before = sizes.gather(1, order).cumsum(1) - sizes.gather(1, order)
        left = torch.empty_like(before).scatter_(1, order, self.budget - before)  # of the budget, for each cluster
        cut = (left > 0) & (left < sizes)
        whole, in_cut = (left >= sizes).gather(1, labels), cut.gather(1, labels)  # at most one cluster is cut
        first = in_cut.cumsum(1) <= (left * cut).sum(1, keepdim=True)
        return whole | (in_cut & first)

    def _cluster_new(self, sequence: Sequence) -> None:
        """The prompt before the first step, then the generated keys whenever enough have gathered."""
        state, end = sequence.state, sequence.k.shape[1] - 1  # not the newest one
        start = self.sinks if state is None else state.end
        if end <= start or (state is not None and end - start < self.recluster):
            return
        keys = sequence.k[:, start:end]
        count = max(1, round(keys.shape[1] / self.keys_per_cluster))
        labels, centroids, sizes = kmeans(keys, count, self.iterations)
        if state is not None:
            labels = torch.cat([state.labels, labels + state.centroids.shape[1]], 1)
            centroids = torch.cat([state.centroids, centroids], 1)
            sizes = torch.cat([state.sizes, sizes], 1)
        sequence.state = Clusters(labels, centroids, sizes, end)


def kmeans(keys: Tensor, count: int, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Clusters by cosine similarity: labels [g, n], mean keys [g, count, d] (0 of an empty one), sizes [g, count]."""
    g, n, d = keys.shape
    keys = wide(keys)
    directions = F.normalize(keys, dim=-1)
    centers = directions[:, torch.linspace(0, n - 1, count, device=keys.device).round().long()]
    labels = (directions @ centers.mT).argmax(-1)
    for _ in range(iterations - 1):
        sums = torch.zeros_like(centers).scatter_add_(1, labels[..., None].expand(-1, -1, d), directions)
        centers = torch.where((sums == 0).all(-1, keepdim=True), centers, F.normalize(sums, dim=-1))
        labels = (directions @ centers.mT).argmax(-1)
    sums = torch.zeros_like(centers).scatter_add_(1, labels[..., None].expand(-1, -1, d), keys)
    sizes = torch.zeros(g, count, device=keys.device, dtype=torch.long).scatter_add_(1, labels, torch.ones_like(labels))
    return labels, sums / sizes.clamp(min=1)[..., None], sizes
