"""The decoding kernels of one case against fp64, within the budget that plain PyTorch sets; interpreter and GPU."""

import torch
from decoding import DecodeCase, Scene, append_arguments
from dense_reference import Visible, masked_attention
from layouts import Layout
from torch import Tensor

from nsa.kernels import decode
from nsa.ops.decode import append_tokens, decode_attention
from nsa.testing import assert_close_to_fp64, assert_same_selection

MEMORY = ("k", "v", "k_cmp", "v_cmp", "k_win", "v_win", "k_raw", "v_raw")


def check_attention(case: DecodeCase, device: str) -> None:
    scene = Scene(case, device)
    tensors = scene.cache(case.lengths)
    q, scale, config = scene.q, scene.scale, case.config
    out, picks = decode.attend(q, scene.gates, tensors, config, scale)
    assert not tensors.arrivals.any(), "counters should be 0 again"

    layout = Layout(b=len(case.lengths), t=case.t, s=scene.longest, seqlens_k=case.lengths)
    visible = Visible(layout, config, device)
    position = scene.query_positions()
    # Queries with at most n blocks read them all; the kernels choose none for them.
    own = (position // config.select_block_size)[:, :, None, None]
    n = config.num_selected_blocks
    every = torch.arange(n, dtype=torch.int32, device=device)
    every = torch.where((every <= own) & (position >= 0)[:, :, None, None], every, -1)
    picks = torch.where(own >= n, picks[..., :n], every)
    scores = [visible.block_scores(q.to(x), scene.k_cmp.to(x), scale) for x in (torch.float64, torch.float32)]
    assert_same_selection(picks, scores[0], position, config, plain_scores=scores[1])

    keys = (scene.k_cmp, scene.v_cmp, scene.rotated(scene.k), scene.v, scene.rotated(scene.k_win), scene.v_win)
    masks = (visible.compressed(), visible.selected(picks), visible.window())

    def reference(dtype: torch.dtype) -> Tensor:
        xs = [x.to(dtype) for x in keys]
        outs = [masked_attention(q.to(dtype), *xs[2 * i : 2 * i + 2], masks[i], scale)[0] for i in range(3)]
        return sum(scene.gates.to(dtype)[..., i : i + 1] * outs[i] for i in range(3))

    largest = float(q.float().norm(dim=-1).amax() * max(x.float().norm(dim=-1).amax() for x in keys[::2] if x.numel()))
    truth, plain = reference(torch.float64), reference(case.dtype)
    assert_close_to_fp64(out, plain, truth, "out", largest_score=largest * scale)
    assert not out[position < 0].any(), "padding gives 0"


def check_not_finite(case: DecodeCase, name: str, value: float, device: str) -> None:
    """One number of row 0 reaches what sees it, and no other row; the selection keeps its forced blocks. t is 1."""
    scene, config = Scene(case, device), case.config
    clean, _ = decode.attend(scene.q, scene.gates, scene.cache(case.lengths), config, scene.scale)
    if name.endswith("_cmp"):
        scene.__dict__[name] = getattr(scene, name).clone()
    getattr(scene, name)[0, 0 if name == "q" else 20, -1, 1] = value
    tensors = scene.cache(case.lengths)
    out, picks = decode.attend(scene.q, scene.gates, tensors, config, scene.scale)
    # A program of one query reads nothing else, so no more is reached than in PyTorch's operations.
    expected = decode_attention(scene.q, scene.gates, tensors, config, scale=scene.scale)
    assert torch.equal(out[0].isfinite(), expected[0].isfinite())
    assert torch.equal(out[1:], clean[1:])
    own, chosen = (case.lengths[0] - 1) // config.select_block_size, picks[0, 0, -1].tolist()
    chosen = chosen[: config.num_selected_blocks]
    assert chosen == sorted(set(chosen))
    assert {0, own - 1, own} <= set(chosen) <= set(range(own + 1))


def check_append(case: DecodeCase, counts: tuple[int, ...], device: str, rotate_inside: bool = True) -> None:
    """The last counts[r] tokens of each row come at once."""
    scene = Scene(case, device)
    before = tuple(length - count for length, count in zip(case.lengths, counts, strict=True))
    found, plain, untouched = (scene.cache(before) for _ in range(3))
    given = scene.new_tokens(before, case.t, counts, rotate_inside)
    decode.append_tokens(found, **append_arguments(given))
    append_tokens(plain, **append_arguments(given))
    truth = scene.to(torch.float64).cache(case.lengths)
    assert found.lengths.tolist() == list(case.lengths)
    for name in MEMORY:
        x, p, r, u = (getattr(tensors, name) for tensors in (found, plain, truth, untouched))
        if x is not None:
            written = r != 97.0
            # Rings keep what was there before the slots that the hand-made cache shows.
            changed = (x != u) & ~written
            assert not changed.any(), f"{name}: {int(changed.sum())} elements changed that should not"
            assert_close_to_fp64(x[written], p[written], r[written], name)
