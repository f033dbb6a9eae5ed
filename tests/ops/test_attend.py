"""One verb for every branch: what it says of a stream is what the op of that branch says."""

import pytest
import torch
from layouts import LAYOUTS
from torch import Tensor

from nsa.config import NSAConfig
from nsa.ops.attend import attend
from nsa.ops.causal_attention import causal_attention
from nsa.ops.compressed_attention import compressed_attention
from nsa.ops.selected_attention import selected_attention
from nsa.ops.selection import select_blocks
from nsa.ops.window_attention import window_attention
from nsa.streams import Blocks, Causal, Stream, Window

CONFIG = NSAConfig(
    compress_block_size=8, compress_stride=4, select_block_size=8, num_selected_blocks=4, window_size=10
)  # fmt: skip


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_reach_over_its_stream_is_the_op_of_its_branch(layout):
    layout = LAYOUTS[layout]
    where, c = layout.sequences(), layout.num_compressed_blocks(CONFIG)
    q, k, v = normal(layout.b, layout.t, 4, 6), normal(layout.b, layout.s, 2, 6), normal(layout.b, layout.s, 2, 5)
    k_cmp, v_cmp = normal(layout.b, c, 2, 6), normal(layout.b, c, 2, 5)
    raw = Stream(k, v, where=where)
    of_tokens = {"num_keys": layout.s, "sequences": where, "scale": 0.3}
    indices = select_blocks(q, k_cmp, CONFIG, **of_tokens)
    rest = {"sequences": where, "scale": 0.3}
    cmp = Stream(k_cmp, v_cmp, 8, 4, where, layout.s)
    for stream, reach, expected in (
        (cmp, Causal(), compressed_attention(q, k_cmp, v_cmp, CONFIG, **of_tokens)),
        (raw, Window(10), window_attention(q, k, v, 10, **rest)),
        (raw, Blocks(indices, 8), selected_attention(q, k, v, indices, CONFIG, **rest)),
        (raw, Causal(), window_attention(q, k, v, layout.s, **rest)),
    ):  # fmt: skip
        for found, one in zip(attend(q, stream, reach, scale=0.3), expected, strict=True):
            torch.testing.assert_close(found, one, rtol=0, atol=1e-12)


def test_causal_attention_over_raw_keys_is_that_of_the_whole_past():
    q, k, v = normal(2, 30, 4, 6), normal(2, 30, 2, 6), normal(2, 30, 2, 6)
    found, _ = attend(q, Stream(k, v), Causal())
    torch.testing.assert_close(found, causal_attention(q, k, v), rtol=0, atol=1e-12)


def test_what_does_not_fit_is_one_line(without_shape_checks):
    q, k = normal(1, 5, 2, 4), normal(1, 5, 1, 4)
    with pytest.raises(ValueError, match=r"^attend: Window is of raw streams, got one entry for 8 tokens$"):
        attend(q, Stream(k, k, 8, 4), Window(3))
    with pytest.raises(ValueError, match=r"^attend: v should have shape \[b=1, c=5, g=1, e\], got \[1, 4, 1, 4\]$"):
        attend(q, Stream(k, k[:, :4]), Causal())
    with pytest.raises(ValueError, match=r"^window_attention: window_size should be at least 1, got 0$"):
        attend(q, Stream(k, k), Window(0))
