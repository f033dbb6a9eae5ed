"""Native Sparse Attention as a function: what it takes, and what it makes of it; `nsa.methods.nsa` does the rest."""

from contextlib import nullcontext
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nsa.backend import Backend, resolve
from nsa.cache_tensors import as_computed
from nsa.composed import is_traced
from nsa.config import NSAConfig
from nsa.methods import nsa as method
from nsa.ops.compress import compress, phi_mean
from nsa.ops.tiled_attention import factor
from nsa.shapes import Sequences, bind, check_lengths, check_queries
from nsa.streams import Branches

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DEFAULT = NSAConfig()


class Lengths(NamedTuple):
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    seqlens_k: Tensor | None
    seqlens_win: Tensor | None


def native_sparse_attention(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b s g d"],
    v: Float[Tensor, "b s g e"],
    gates: Float[Tensor, "b t h 3"],
    config: NSAConfig = DEFAULT,
    *,
    k_cmp: Float[Tensor, "b c g d"] | None = None,
    v_cmp: Float[Tensor, "b c g e"] | None = None,
    k_win: Float[Tensor, "b s_win g d"] | None = None,
    v_win: Float[Tensor, "b s_win g e"] | None = None,
    cu_seqlens_q: Int[Tensor, " sequences_plus_1"] | None = None,
    cu_seqlens_k: Int[Tensor, " sequences_plus_1"] | None = None,
    seqlens_k: Int[Tensor, " b"] | None = None,
    seqlens_win: Int[Tensor, " b"] | None = None,
    max_seqlen_k: int | None = None,
    scale: float | None = None,
    nonnegative_gates: bool = False,
    backend: Backend | None = None,
) -> Float[Tensor, "b t h e"]:
    """Compressed, selected and window attention of every query, added by its gates.

        o_t = sum over c in {cmp, slc, win} of g_t^c Attn(q_t, K_t^c, V_t^c)      eq. 5

    The queries are the last t of s positions: t == s in training, t == 1 in decoding, anything between in a chunk
    of prefill.

    Args:
        q: queries of all heads; h is a multiple of g.
        k, v: keys and values of the selection branch. All keys and values have q's dtype and device.
        gates: one scalar per query, head and branch, in the order cmp, slc, win.
        config: block sizes and counts.
        k_cmp, v_cmp: compressed keys and values; by default the block means of k and v.
        k_win, v_win: keys and values of the window branch, at least the last t + w - 1 of them (all, where sequences
            are packed); by default k and v.
        cu_seqlens_q, cu_seqlens_k: packed sequences (b == 1) as in FlashAttention's varlen API; the second only
            where a sequence has more keys than queries.
        seqlens_k: keys of each row, left-aligned, where rows differ; queries are right-aligned, and those at a
            negative position are padding.
        seqlens_win: the same for k_win; by default seqlens_k, where k_win holds as many keys as k.
        max_seqlen_k: for packed sequences, a bound on the keys of the longest, as in FlashAttention's varlen API. The
            kernels trust it and spare the selection what no sequence reaches; the PyTorch operations check it.
        scale: factor of the scores, > 0, d ** -0.5 by default.
        nonnegative_gates: whether no gate is negative, as none from a sigmoid is. The kernels' backward then needs no
            copy of the output's gradient for each branch; with it a negative gate's gradients are NaN.
        backend: "torch" for the PyTorch operations of `nsa.ops`; "triton" for the kernels (docs/kernels.md says what
            they take), an error where they cannot serve; "auto" for the kernels where they can. By default what
            `nsa.backend.use_backend` says, at first "auto".

    Returns:
        [b, t, h, e] in q's dtype. A branch in which a query sees no key adds 0; padding queries give 0.

    Under `torch.autocast` queries, keys and values are cast to its dtype first, as for PyTorch's own attention. The
    kernels do not read lengths on the host, so nothing waits for the device, and lengths are trusted; the PyTorch
    operations check them.

    Raises:
        ValueError: shapes or lengths that do not fit, in one line that names the step; a backend that cannot serve.

    Source: paper section 3. Tested against the fp64 brute force of nsa.testing, and against itself under every
    split into prefill chunks and decoding steps.
    """
    tensors = {"q": q, "k": k, "v": v, "gates": gates}
    given = {"k_cmp": k_cmp, "v_cmp": v_cmp, "k_win": k_win, "v_win": v_win}
    tensors |= {name: x for name, x in given.items() if x is not None}
    lengths = Lengths(cu_seqlens_q, cu_seqlens_k, seqlens_k, seqlens_win)
    return _attend(tensors, lengths, config, scale, max_seqlen_k, nonnegative_gates, backend)


def attend_to_branches(
    q: Float[Tensor, "b t h d"],
    branches: Branches,
    gates: Float[Tensor, "b t h 3"],
    config: NSAConfig,
    *,
    max_seqlen_k: int | None = None,
    nonnegative_gates: bool = False,
) -> Float[Tensor, "b t h e"]:
    """`native_sparse_attention` of keys and values as streams."""
    cmp, slc, win = branches
    tensors = {"q": q, "k": slc.k, "v": slc.v, "gates": gates}
    tensors |= {"k_cmp": cmp.k, "v_cmp": cmp.v, "k_win": win.k, "v_win": win.v}
    return _attend(tensors, Lengths(*branches.lengths), config, None, max_seqlen_k, nonnegative_gates, None)


def _attend(
    tensors: dict[str, Tensor], lengths: Lengths, config: NSAConfig, scale: float | None, max_seqlen_k: int | None,
    nonnegative_gates: bool, backend: Backend | None,
) -> Tensor:  # fmt: skip
    """Checked, cast and filled in: keys and values of compression are means, those of the window the selection's."""
    _check_kinds(tensors, lengths, config)
    if max_seqlen_k is not None and (not isinstance(max_seqlen_k, int) or max_seqlen_k < 0):
        raise ValueError(f"{OP}: max_seqlen_k should be a number of keys, got {max_seqlen_k!r}")
    q = tensors["q"]
    scale = factor(q, scale)
    where = Sequences(lengths.cu_seqlens_q, lengths.cu_seqlens_k, lengths.seqlens_k)
    device = q.device.type
    is_autocast = device != "meta" and torch.is_autocast_enabled(device)
    if is_autocast:
        tensors = {name: x if name == "gates" else as_computed(x)[0] for name, x in tensors.items()}
    _check_tensors(tensors, lengths, config)

    if "k_win" not in tensors:
        tensors |= {"k_win": tensors["k"], "v_win": tensors["v"]}
    # The sums inside are fp32; autocast would round their terms.
    with torch.autocast(device, enabled=False) if is_autocast else nullcontext():
        if "k_cmp" not in tensors:
            tensors |= {f"{x}_cmp": compress(tensors[x], phi_mean, config, sequences=where) for x in "kv"}
        q, *keys = (tensors[name] for name in ("q", "k_cmp", "v_cmp", "k", "v", "k_win", "v_win"))
        branches = Branches.of(config, keys, lengths)
        on = resolve(q, *keys, scale=scale, backend=backend)
        if on == "torch" and not is_traced(q):
            _check_values(tensors, lengths, config, max_seqlen_k)
        return method.attention(
            q, branches, tensors["gates"], config, scale, on=on, nonnegative_gates=nonnegative_gates,
            max_seqlen_k=max_seqlen_k,
        )  # fmt: skip


# ---- what the function takes ----

OP = "native_sparse_attention"
SHAPES = {
    "q": "b t h d", "k": "b s g d", "v": "b s g e", "gates": "b t h 3",
    "k_cmp": "b c g d", "v_cmp": "b c g e", "k_win": "b u g d", "v_win": "b u g e",
}  # fmt: skip


def _check_kinds(tensors: dict[str, Tensor], lengths: Lengths, config: NSAConfig) -> None:
    """What has to hold before anything can be asked of the arguments."""
    if not isinstance(config, NSAConfig):
        raise ValueError(f"{OP}: config should be an NSAConfig (NSAConfig.from_dict), got {type(config).__name__}")
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise ValueError(
                f"{OP}: {name} should be a tensor [{', '.join(SHAPES[name].split())}], got {type(x).__name__}"
            )
        if x.dtype not in DTYPES:
            raise ValueError(f"{OP}: {name} should be of float64, float32, bfloat16 or float16, got {x.dtype}")
    for name, rows in zip(Lengths._fields, lengths, strict=True):
        if rows is not None:
            check_lengths(name, rows)
    for one, other in (("k_cmp", "v_cmp"), ("k_win", "v_win")):
        if (one in tensors) != (other in tensors):
            raise ValueError(f"{OP}: give {one} and {other} together, got only one of them")
    if lengths.seqlens_win is not None and "k_win" not in tensors:
        raise ValueError(f"{OP}: seqlens_win is the length of k_win and v_win, which were not given")
    if lengths.cu_seqlens_q is not None and lengths.seqlens_win is not None:
        raise ValueError(f"{OP}: give either cu_seqlens_q (packed) or seqlens_win (ragged rows), not both")


def _check_tensors(tensors: dict[str, Tensor], lengths: Lengths, config: NSAConfig) -> None:
    """What shapes, dtypes and devices tell: nothing that would have to ask the device."""
    q, gates = tensors["q"], tensors["gates"]
    if q.dim() == gates.dim() == 4 and q.shape[1] != q.shape[2] and q.shape[1:3] == gates.shape[2:0:-1]:
        raise ValueError(f"{OP}: q should have tokens before heads, as gates do: [b, t, h, d], got {list(q.shape)}")
    sizes = bind(OP, **{name: (x, SHAPES[name]) for name, x in tensors.items()})
    b, t, s = (sizes[letter] for letter in "bts")
    c, u = sizes.get("c"), sizes.get("u", s)
    for name, x in tensors.items():
        if x.dtype != q.dtype and name != "gates":
            raise ValueError(f"{OP}: {name} should have q's dtype {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{OP}: {name} should be on q's device {q.device}, got {x.device}")
    cu_q, cu_k, seqlens_k, seqlens_win = lengths
    check_queries(OP, (b, t, s), cu_q, cu_k, seqlens_k)
    if seqlens_win is not None and seqlens_win.shape[0] != b:
        raise ValueError(f"{OP}: seqlens_win should have shape [b={b}], got {list(seqlens_win.shape)}")
    if cu_q is not None:
        if u != s:
            raise ValueError(f"{OP}: k_win should hold the s = {s} keys that are packed in k, got {u}")
        return
    expected = config.num_compressed_blocks(s)
    if c is not None and (c != expected if seqlens_k is None else c < expected):
        raise ValueError(f"{OP}: k_cmp: expected {expected} compressed blocks for {s} keys, got {c}")
    if seqlens_win is not None:
        return
    needed = min(s, t + config.window_size - 1)
    if seqlens_k is not None and u != s:
        raise ValueError(f"{OP}: seqlens_win should be given where k_win has not the s = {s} keys of k, got {u}")
    if seqlens_k is None and not needed <= u <= s:
        raise ValueError(
            f"{OP}: k_win should hold the last {needed} to {s} keys, for {t} queries and a window of "
            f"{config.window_size}, got {u}"
        )


def _check_values(tensors: dict[str, Tensor], lengths: Lengths, config: NSAConfig, max_seqlen_k: int | None) -> None:
    """What only the values of lengths tell, beside what `nsa.shapes.Sequences` finds."""
    cu_q, cu_k, seqlens_k, seqlens_win = lengths
    cu = cu_q if cu_k is None else cu_k
    if cu is not None and max_seqlen_k is not None and len(cu) > 1:
        longest = int(cu.diff().max())
        if longest > max_seqlen_k:
            raise ValueError(f"{OP}: max_seqlen_k is {max_seqlen_k}, but a sequence has {longest} keys")
    if seqlens_win is None or seqlens_win is seqlens_k:
        return
    (b, t), s, u = tensors["q"].shape[:2], tensors["k"].shape[1], tensors["k_win"].shape[1]
    # How many keys a ragged row needs is not known: some of its queries may be padding.
    needed = min(s, t + config.window_size - 1) if seqlens_k is None else 0
    found, bounds = seqlens_win.tolist(), [s] * b if seqlens_k is None else seqlens_k.tolist()
    if any(not needed <= length <= min(bound, u) for length, bound in zip(found, bounds, strict=True)):
        raise ValueError(
            f"{OP}: seqlens_win should lie between {needed} and the rows' keys, at most k_win's {u}, "
            f"got {found} for rows of {bounds}"
        )
