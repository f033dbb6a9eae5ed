"""The shape checker's messages and where it says that sequences lie."""

import pytest
import torch
from layouts import LAYOUTS

from nsa.config import NSAConfig
from nsa.shapes import Sequences, bind

CONFIG = NSAConfig(compress_block_size=4, compress_stride=2, select_block_size=8, num_selected_blocks=4)


def test_a_letter_is_one_size_everywhere():
    q, k = torch.zeros(2, 5, 4, 3), torch.zeros(2, 9, 2, 3)
    assert bind("op", q=(q, "b t h d"), k=(k, "b s g d")) == {"b": 2, "t": 5, "h": 4, "d": 3, "s": 9, "g": 2}


@pytest.mark.parametrize(
    ("shape", "got"),
    [((2, 9, 2, 4), r"\[2, 9, 2, 4\]"), ((1, 9, 2, 3), r"\[1, 9, 2, 3\]"), ((9,), r"\[9\]"), ((), r"\[\]")],
)
def test_a_mismatch_names_the_op_the_argument_the_sizes_so_far_and_what_came(shape, got):
    q, k = torch.zeros(2, 5, 4, 3), torch.zeros(shape)
    with pytest.raises(ValueError, match=rf"^op: k should have shape \[b=2, s, g, d=3\], got {got}$"):
        bind("op", q=(q, "b t h d"), k=(k, "b s g d"))


@pytest.mark.parametrize(("h", "g"), [(3, 2), (1, 2)])
def test_query_heads_are_a_multiple_of_the_kv_heads(h, g):
    q, k = torch.zeros(2, 5, h, 3), torch.zeros(2, 9, g, 3)
    with pytest.raises(ValueError, match=rf"^op: .*multiple of the KV heads, got {h} and {g}$"):
        bind("op", q=(q, "b t h d"), k=(k, "b s g d"))


def test_no_kv_head_is_one_clear_line():
    q, k = torch.zeros(2, 5, 2, 3), torch.zeros(2, 9, 0, 3)
    with pytest.raises(ValueError, match=r"^op: there should be a query head and a KV head, got 2 and 0$"):
        bind("op", q=(q, "b t h d"), k=(k, "b s g d"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_are_the_members_of_the_brute_force(layout):
    layout = LAYOUTS[layout]
    found = [
        (row, part.q_start, part.num_queries, part.k_start, part.num_keys, part.c_start)
        for part in layout.sequences().parts(CONFIG.num_compressed_blocks, layout.b, layout.t, layout.s)
        for row in range(part.rows.start, part.rows.stop)
    ]
    assert found == [
        (
            member.row,
            member.query_range.start,
            member.query_range.stop - member.query_range.start,
            member.key_range.start,
            member.length,
            member.block_range.start,
        )
        for member in layout.members(CONFIG)
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compressed_blocks_are_counted_for_all_sequences(layout):
    layout = LAYOUTS[layout]
    counted = layout.sequences().num_entries(CONFIG.num_compressed_blocks, layout.s)
    assert counted == layout.num_compressed_blocks(CONFIG)


def test_lengths_may_be_int32_or_int64():
    for dtype in (torch.int32, torch.int64):
        cu_seqlens = torch.tensor([0, 4, 9], dtype=dtype)
        assert len(list(Sequences(cu_seqlens_q=cu_seqlens).parts(None, 1, 9, 9))) == 2
