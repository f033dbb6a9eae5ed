"""What the methods share: scores, softmax over allowed keys, dense attention, moving rotary positions.

Plain torch, a chunk of queries at a time, so that no score matrix is larger than CHUNK_ELEMENTS says. Scores and
softmax are in at least float32 whatever the model's dtype.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from nsa.eval.methods.method import Sequence

# Of one score matrix: 16 MiB in float32, which the CPU's allocator keeps and hands out again; 256 MiB on a GPU.
CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**26}


def scores(q: Tensor, k: Tensor, scaling: float) -> Tensor:
    """[h, t, d], [g, n, d] -> scaling * q . k, [h, t, n], in at least float32."""
    h, t, d = q.shape
    folded = wide(q).reshape(k.shape[0], -1, d)
    return (folded @ wide(k).transpose(1, 2) * scaling).reshape(h, t, -1)


def softmax(s: Tensor, allowed: Tensor) -> Tensor:
    """Over the allowed keys of each query; rows without any are zero."""
    s = s.masked_fill(~allowed, -torch.inf)
    highest = s.amax(-1, keepdim=True)
    weights = (s - highest.masked_fill(highest == -torch.inf, 0.0)).exp()
    return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


def weigh(p: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """[h, t, n], [g, n, e] -> sum_n p v, [h, t, e]."""
    h, t, n = p.shape
    return (p.reshape(v.shape[0], -1, n) @ wide(v)).reshape(h, t, -1).to(dtype)


def attend(q: Tensor, sequence: Sequence, allowed: Tensor) -> Tensor:
    """Softmax attention of q [h, t, d] over the allowed [h, t, n] of the sequence's keys; counts them."""
    sequence.read(allowed)
    p = softmax(scores(q, sequence.k, sequence.scaling), allowed)
    return weigh(p, sequence.v, q.dtype)


def causal(t: int, n: int, device: torch.device, first: int = 0, last: int | None = None) -> Tensor:
    """[last - first, n]: which of n keys the queries first..last of the last t tokens see."""
    queries = torch.arange(n - t + first, n - t + (t if last is None else last), device=device)
    return torch.arange(n, device=device) <= queries[:, None]


def chunks(q: Tensor, n: int) -> Iterator[tuple[int, int]]:
    """Ranges [first, last) of the queries [h, t, d] for which a score matrix [h, last - first, n] fits."""
    h, t, _ = q.shape
    step = max(1, CHUNK_ELEMENTS.get(q.device.type, 2**22) // (h * n))
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
        parts.append(
            F.scaled_dot_product_attention(
                q[None, :, first:last],
                k,
                v,
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
    least = s.topk(count, sorted=False).values.amin(-1, keepdim=True)  # much less work than to sort
    best = (s >= least) & (s != -torch.inf)
    if not bool((best.sum(-1) > count).any()):
        return best
    above, tied = s > least, s == least
    places = count - above.sum(-1, keepdim=True)
    return above | (tied & (tied.cumsum(-1, dtype=torch.int32) <= places))


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
