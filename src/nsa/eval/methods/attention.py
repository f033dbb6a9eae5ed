"""What the methods share: scores, softmax over allowed keys, dense attention, moving rotary positions.

Plain torch, a chunk of queries at a time, so that no score matrix is larger than CHUNK_ELEMENTS says. Scores and
softmax are in at least float32 whatever the model's dtype.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nsa.eval.methods.sequence import Sequence

# Of one score matrix: 4 MiB in float32, which a CPU's caches nearly hold (a third of the time of 16 MiB); 256 MiB on
# a GPU.
CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}


def scores(q: Tensor, k: Tensor, scaling: float) -> Tensor:
    """[h, t, d], [g, n, d] -> scaling * q . k, [h, t, n], in at least float32."""
    h, t, d = q.shape
    folded = (wide(q) * scaling).reshape(k.shape[0], -1, d)
    return (folded @ wide(k).transpose(1, 2)).reshape(h, t, -1)


def softmax(s: Tensor, allowed: Tensor) -> Tensor:
    """Over the allowed keys of each query; rows without any are zero."""
    s = torch.where(allowed, s, -torch.inf)
    nothing = s.amax(-1, keepdim=True) == -torch.inf
    return torch.softmax(s, -1).masked_fill_(nothing, 0.0)


def weigh(p: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """[h, t, n], [g, n, e] -> sum_n p v, [h, t, e]."""
    h, t, n = p.shape
    return (p.reshape(v.shape[0], -1, n) @ wide(v)).reshape(h, t, -1).to(dtype)


def attend(q: Tensor, sequence: Sequence, allowed: Tensor, s: Tensor | None = None) -> Tensor:
    """Softmax attention of q [h, t, d] over the allowed [h, t, m] of the sequence's first m keys; counts them.

    `s` are their scores [h, t, m], where the method has computed them already.
    """
    sequence.read(allowed)
    m = allowed.shape[-1]
    s = scores(q, sequence.k[:, :m], sequence.scaling) if s is None else s
    return weigh(softmax(s, allowed), sequence.v[:, :m], q.dtype)


def causal(t: int, n: int, device: torch.device, first: int = 0, last: int | None = None) -> Tensor:
    """[last - first, m]: which keys the queries first..last of the last t of n tokens see, m those of the last one."""
    end = n - t + (t if last is None else last)
    queries = torch.arange(n - t + first, end, device=device)
    return torch.arange(end, device=device) <= queries[:, None]


def chunk_size(q: Tensor, n: int) -> int:
    """How many queries of [h, t, d] may have scores with n keys at once."""
    return max(1, CHUNK_ELEMENTS.get(q.device.type, CHUNK_ELEMENTS["cpu"]) // (q.shape[0] * n))


def chunks(q: Tensor, n: int) -> Iterator[tuple[int, int]]:
    """Ranges [first, last) of the queries [h, t, d] for which a score matrix [h, last - first, n] fits."""
    t, step = q.shape[1], chunk_size(q, n)
    for first in range(0, t, step):
        yield first, min(t, first + step)


def dense(q: Tensor, sequence: Sequence) -> Tensor:
    """Full causal attention through torch's SDPA; the last t of n tokens."""
    h, t, _ = q.shape
    n = sequence.k.shape[1]
    k, v = sequence.k[None], sequence.v[None]
    parts = []
    for first, last in [(0, t)] if t in (1, n) else chunks(q, n):
        allowed = causal(t, n, q.device, first, last) if t not in (1, n) else None
        m = n - t + last
        parts.append(
            F.scaled_dot_product_attention(
                q[None, :, first:last],
                k[:, :, :m],
                v[:, :, :m],
                attn_mask=allowed,
                is_causal=t == n and t > 1,
                scale=sequence.scaling,
                enable_gqa=h != k.shape[1],
            )[0]
        )
    sequence.read(float(sum(range(n - t + 1, n + 1))))
    return torch.cat(parts, dim=1)


def top(s: Tensor, count: int) -> Tensor:
    """A mask of the `count` highest along the last dimension, -inf never among them; ties to the lower index."""
    count = min(count, s.shape[-1])
    if count <= 0:
        return torch.zeros_like(s, dtype=torch.bool)
    least = nth_highest(s, count).clamp(min=torch.finfo(s.dtype).min)
    best = s >= least
    if s.device.type == "cpu" and not bool((best.sum(-1, dtype=torch.int32) > count).any()):
        return best  # no ties; on a GPU to ask costs more than to treat them
    above, tied = s > least, s == least
    places = count - above.sum(-1, keepdim=True)
    return above | (tied & (tied.cumsum(-1, dtype=torch.int32) <= places))


def nth_highest(s: Tensor, n: int) -> Tensor:
    """The n-th highest of the last dimension, from 1, kept as a dimension of size 1; NaN counts as the highest."""
    if s.device.type == "cpu":  # numpy's selection takes a quarter of the time of torch's
        place = s.shape[-1] - n
        return torch.from_numpy(np.partition(s.numpy(), place, axis=-1)[..., place : place + 1])
    return s.topk(n, sorted=False).values.amin(-1, keepdim=True)


def moved(x: Tensor, by: Tensor | int, inv_freq: Tensor) -> Tensor:
    """x [..., t, d], as if its rotary positions were `by` [t] larger (Llama's layout: halves, not pairs)."""
    by = torch.as_tensor(by, device=x.device, dtype=torch.float64)
    angles = by[..., None] * inv_freq.to(by)  # positions reach a million: float32 would round them
    cos, sin = (f(angles).to(wide(x).dtype) for f in (torch.cos, torch.sin))
    low, high = wide(x).chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
