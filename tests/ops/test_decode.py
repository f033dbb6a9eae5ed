"""Appending to a cache and attending from its end, against caches written out by hand and the fp64 brute force."""

from dataclasses import replace

import pytest
import torch
from decoding import DecodeCase, Scene, append_arguments, rotate, same_memory
from torch import Tensor

from nsa.config import NSAConfig
from nsa.functional import native_sparse_attention
from nsa.ops.decode import append_tokens, decode_attention
from nsa.testing import brute_force as paper

SMALL = NSAConfig(
    compress_block_size=4, compress_stride=2, select_block_size=8, num_selected_blocks=4, window_size=6,
    compression="mean",
)  # fmt: skip
WIDE = NSAConfig(
    compress_block_size=12, compress_stride=4, select_block_size=16, num_selected_blocks=3, window_size=9,
    compression="linear",
)  # fmt: skip
FLAT = NSAConfig(
    compress_block_size=8, compress_stride=8, select_block_size=8, num_selected_blocks=3, window_size=5, shared_kv=True
)
DOUBLE = {"dtype": torch.float64, "h": 4, "g": 2, "d": 4, "e": 6}


@pytest.mark.parametrize("page_size", [None, 16, 48])
@pytest.mark.parametrize("config", [SMALL, WIDE, FLAT], ids=["mean", "linear", "mlp, shared"])
@pytest.mark.parametrize(("before", "t", "counts"), [
    ((0, 1, 15, 16, 47), 1, (1, 1, 1, 1, 1)),
    ((0, 3, 31, 0, 50), 1, (0, 1, 1, 0, 1)),
    ((0, 3, 11, 29, 44), 7, (7, 7, 7, 7, 7)),
    ((0, 3, 11, 29, 44), 19, (4, 0, 19, 1, 18)),
])  # fmt: skip
@pytest.mark.parametrize("rotate_inside", [False, True])
def test_append_writes_what_belongs_there_and_nothing_else(config, page_size, before, t, counts, rotate_inside) -> None:
    after = tuple(b + n for b, n in zip(before, counts, strict=True))
    scene = Scene(DecodeCase(lengths=after, t=t, config=config, page_size=page_size, **DOUBLE))
    tensors = scene.cache(before)
    given = scene.new_tokens(before, t, counts, rotate_inside)
    append_tokens(tensors, **append_arguments(given))
    same_memory(tensors, scene.cache(after))


def test_a_token_at_a_time_is_the_same_as_many() -> None:
    case = DecodeCase(lengths=(40, 40), config=SMALL, **DOUBLE)
    scene = Scene(case)
    tensors = scene.cache((0, 13))
    for step in range(40):
        counts = (1, int(step < 27))
        before = tuple(tensors.lengths.tolist())
        append_tokens(tensors, **append_arguments(scene.new_tokens(before, 1, counts, True)))
    same_memory(tensors, scene.cache((40, 40)))


@pytest.mark.parametrize("page_size", [None, 16])
def test_without_room_it_is_one_line_and_nothing_changes(page_size) -> None:
    scene = Scene(DecodeCase(lengths=(16, 9), config=SMALL, page_size=page_size, **DOUBLE))
    tensors, unchanged = scene.cache((16, 9)), scene.cache((16, 9))
    given = scene.new_tokens((16, 9), 1, (1, 1), True)
    with pytest.raises(ValueError, match=r"^append_tokens: no room for \[1, 1\] tokens behind \[16, 9\]: [^\n]*$"):
        append_tokens(tensors, **append_arguments(given))
    same_memory(tensors, unchanged)


def truth(scene: Scene) -> Tensor:
    """The brute force, a row at a time; q and the keys as they are after rotation."""
    rows = []
    for row, length in enumerate(scene.case.lengths):
        padding = max(0, scene.case.t - length)
        rest = [scene.rotated(scene.k), scene.v, scene.k_cmp, scene.v_cmp, scene.rotated(scene.k_win), scene.v_win]
        num_blocks = scene.case.config.num_compressed_blocks(length)
        k, v, k_cmp, v_cmp, k_win, v_win = (x[row, : num_blocks if i in (2, 3) else length] for i, x in enumerate(rest))
        out = paper.native_sparse_attention(
            scene.q[row, padding:], k, v, scene.gates[row, padding:], scene.case.config,
            k_cmp=k_cmp, v_cmp=v_cmp, k_win=k_win, v_win=v_win,
        )  # fmt: skip
        rows.append(torch.cat([out.new_zeros(padding, *out.shape[1:]), out]))
    return torch.stack(rows)


LENGTHS = [(1, 2, 3, 4), (0, 7, 8, 9), (15, 16, 17, 0), (33, 48, 49, 70)]


@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("config", [SMALL, WIDE, FLAT], ids=["mean", "linear", "mlp, shared"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("t", [1, 3])
def test_attention_from_the_end_of_a_cache_is_the_brute_force(config, page_size, lengths, t) -> None:
    scene = Scene(DecodeCase(lengths=lengths, t=t, config=config, page_size=page_size, room=20, **DOUBLE))
    out = decode_attention(scene.q, scene.gates, scene.cache(lengths), config)
    torch.testing.assert_close(out, truth(scene))


def test_queries_are_rotated_inside_where_they_come_with_factors() -> None:
    lengths = (5, 0, 30)
    scene = Scene(DecodeCase(lengths=lengths, t=2, config=SMALL, **DOUBLE))
    cos, sin = scene.rotary(scene.query_positions().clamp(min=0))
    tensors = scene.cache(lengths)
    inside = decode_attention(scene.q, scene.gates, tensors, SMALL, cos=cos, sin=sin)
    outside = decode_attention(rotate(scene.q, cos, sin), scene.gates, tensors, SMALL)
    torch.testing.assert_close(inside, outside)


def test_it_is_the_function_on_the_keys_of_the_cache() -> None:
    case = DecodeCase(lengths=(60,), t=4, config=replace(SMALL, shared_kv=True), **DOUBLE)
    scene = Scene(case)
    k = scene.rotated(scene.k)
    expected = native_sparse_attention(
        scene.q, k, scene.v, scene.gates, case.config, k_cmp=scene.k_cmp, v_cmp=scene.v_cmp, scale=0.3
    )
    found = decode_attention(scene.q, scene.gates, scene.cache((60,)), case.config, scale=0.3)
    torch.testing.assert_close(found, expected)


def test_a_row_does_not_depend_on_the_others() -> None:
    lengths = (60, 0, 33)
    scene = Scene(DecodeCase(lengths=lengths, t=2, config=SMALL, **DOUBLE))
    out = decode_attention(scene.q, scene.gates, scene.cache(lengths), SMALL)
    alone = Scene(DecodeCase(lengths=lengths, t=2, config=SMALL, **DOUBLE))
    others = decode_attention(alone.q, alone.gates, alone.cache((5, 60, 33)), SMALL)
    torch.testing.assert_close(out[2], others[2], rtol=0.0, atol=1e-10)  # another column of the batch, other addresses
    assert not out[1].any()
