"""What the function does not take: one line that names the argument, says what was expected and what came."""

import pytest
import torch
from torch import Tensor

from nsa.config import NSAConfig
from nsa.functional import native_sparse_attention
from nsa.ops.causal_attention import causal_attention
from nsa.ops.compressed_attention import compressed_attention
from nsa.ops.selected_attention import selected_attention
from nsa.ops.selection import block_scores, select_blocks
from nsa.ops.window_attention import window_attention

SMALL = NSAConfig(compress_block_size=4, compress_stride=2, select_block_size=8, num_selected_blocks=4, window_size=6)


def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def lengths(*values: int) -> Tensor:
    return torch.tensor(values)


def given(b: int = 2, t: int = 9, s: int = 9, h: int = 4, g: int = 2, d: int = 3) -> dict[str, Tensor]:
    return {"q": zeros(b, t, h, d), "k": zeros(b, s, g, d), "v": zeros(b, s, g, 5), "gates": zeros(b, t, h, 3)}


ONE, SUFFIX = given(b=1), given(t=2)  # of 2 queries the window of 6 sees 7 keys


def window(keys: int, b: int = 2, g: int = 2) -> dict[str, Tensor]:
    return {"k_win": zeros(b, keys, g, 3), "v_win": zeros(b, keys, g, 5)}


FAULTS: list[tuple[dict, str]] = [
    # kinds
    ({"gates": None}, r"gates should be a tensor \[b, t, h, 3\], got NoneType"),
    ({"q": [[0.0]]}, r"q should be a tensor \[b, t, h, d\], got list"),
    ({"q": zeros(2, 9, 4, 3, dtype=torch.int64)}, r"q should be of float64, .*, got torch.int64"),
    ({"gates": zeros(2, 9, 4, 3, dtype=torch.bool)}, r"gates should be of float64, .*, got torch.bool"),
    ({"config": {"window_size": 6}}, r"config should be an NSAConfig \(NSAConfig.from_dict\), got dict"),
    ({"seqlens_k": [9, 9]}, r"seqlens_k should be a 1-D int32 or int64 tensor, got list"),
    ({"seqlens_k": lengths(9, 9)[None]}, r"seqlens_k should be a 1-D .*, got torch.int64 \[1, 2\]"),
    (window(9) | {"seqlens_win": [9, 9]}, r"seqlens_win should be a 1-D int32 or int64 tensor, got list"),
    ({"cu_seqlens_q": [0, 9]}, r"cu_seqlens_q should be a 1-D int32 or int64 tensor, got list"),
    ({"cu_seqlens_q": torch.tensor([0.0, 9.0])}, r"cu_seqlens_q should be a 1-D .*, got torch.float32 \[2\]"),
    ({"cu_seqlens_q": lengths(0, 9), "cu_seqlens_k": (0, 9)}, r"cu_seqlens_k should be a 1-D .*, got tuple"),
    ({"backend": "cuda"}, r"backend should be 'auto', 'torch' or 'triton', got 'cuda'"),
    # the scale
    *(({"scale": x}, rf"scale should be a finite number above 0, got {x}") for x in (0.0, -1, float("nan"))),
    ({"scale": torch.tensor(1.0)}, r"scale should be a finite number above 0, got tensor"),
    # what goes together
    ({"k_cmp": zeros(2, 3, 2, 3)}, r"give k_cmp and v_cmp together"),
    ({"v_win": zeros(2, 9, 2, 5)}, r"give k_win and v_win together"),
    ({"seqlens_win": lengths(9, 9)}, r"seqlens_win is the length of k_win and v_win, which were not given"),
    ({"cu_seqlens_k": lengths(0, 9)}, r"cu_seqlens_k was given without cu_seqlens_q"),
    (
        {"cu_seqlens_q": lengths(0, 9), "seqlens_k": lengths(9, 9)},
        r"either cu_seqlens_q \(packed\) or seqlens_k \(ragged rows\), not both",
    ),
    (
        ONE | window(9, 1) | {"cu_seqlens_q": lengths(0, 9), "seqlens_win": lengths(9)},
        r"either cu_seqlens_q \(packed\) or seqlens_win \(ragged rows\), not both",
    ),
    # shapes
    ({"v": zeros(2, 8, 2, 5)}, r"v should have shape \[b=2, s=9, g=2, e\], got \[2, 8, 2, 5\]"),
    ({"k": zeros(2, 9, 3)}, r"k should have shape \[b=2, s, g, d=3\], got \[2, 9, 3\]"),
    ({"gates": zeros(2, 9, 4)}, r"gates should have shape \[b=2, t=9, h=4, 3\], got \[2, 9, 4\]"),
    (given(h=5), r"query heads should be a multiple of the KV heads, got 5 and 2"),
    (given(h=0), r"there should be a query head and a KV head, got 0 and 2"),
    (given(g=0), r"there should be a query head and a KV head, got 4 and 0"),
    (given(d=0), r"q should have a head dim of at least 1, got \[2, 9, 4, 0\]"),
    ({name: x.transpose(1, 2) for name, x in given().items() if name != "gates"}, r"q should have tokens before heads"),
    ({name: x.transpose(1, 2) for name, x in given().items()}, r"expected t <= s, got t = 4, s = 2"),
    (window(9, g=1), r"k_win should have shape \[b=2, u, g=2, d=3\], got \[2, 9, 1, 3\]"),
    (
        {"k_cmp": zeros(2, 2, 2, 3), "v_cmp": zeros(2, 2, 2, 5)},
        r"k_cmp: expected 3 compressed blocks for 9 keys, got 2",
    ),
    (
        {"k_cmp": zeros(2, 2, 2, 3), "v_cmp": zeros(2, 2, 2, 5), "seqlens_k": lengths(9, 9)},
        r"k_cmp: expected 3 compressed blocks for 9 keys, got 2",
    ),
    # dtypes
    ({"k": zeros(2, 9, 2, 3, dtype=torch.bfloat16)}, r"k should have q's dtype torch.float64, got torch.bfloat16"),
    (
        window(9) | {"v_win": zeros(2, 9, 2, 5, dtype=torch.float32)},
        r"v_win should have q's dtype torch.float64, got torch.float32",
    ),
    ({"v": torch.empty(2, 9, 2, 5, dtype=torch.float64, device="meta")}, r"v should be on q's device cpu, got meta"),
    # lengths
    (given(s=8), r"expected t <= s, got t = 9, s = 8"),
    (window(8), r"k_win should hold the last 9 to 9 keys, for 9 queries and a window of 6, got 8"),
    (SUFFIX | window(6), r"k_win should hold the last 7 to 9 keys, for 2 queries and a window of 6, got 6"),
    (SUFFIX | window(10), r"k_win should hold the last 7 to 9 keys, for 2 queries and a window of 6, got 10"),
    (
        SUFFIX | window(8) | {"seqlens_k": lengths(9, 8)},
        r"seqlens_win should be given where k_win has not the s = 9 keys of k, got 8",
    ),
    (
        SUFFIX | window(8) | {"seqlens_win": lengths(8, 6)},
        r"seqlens_win should lie between 7 and the rows' keys, at most k_win's 8, got \[8, 6\] for rows of \[9, 9\]",
    ),
    (
        SUFFIX | window(8) | {"seqlens_k": lengths(9, 3), "seqlens_win": lengths(8, 4)},
        r"seqlens_win should lie between 0 and the rows' keys, .*, got \[8, 4\] for rows of \[9, 3\]",
    ),
    (window(9) | {"seqlens_win": lengths(9)}, r"seqlens_win should have shape \[b=2\], got \[1\]"),
    ({"seqlens_k": lengths(9)}, r"seqlens_k should have shape \[b=2\], got \[1\]"),
    ({"seqlens_k": lengths(9, 10)}, r"seqlens_k should lie between 0 and s = 9, got \[9, 10\]"),
    ({"seqlens_k": lengths(9, -1)}, r"seqlens_k should lie between 0 and s = 9, got \[9, -1\]"),
    ({"cu_seqlens_q": lengths(0, 9)}, r"packed sequences should come with b = 1, got b = 2"),
    (ONE | {"cu_seqlens_q": lengths(0, 8)}, r"cu_seqlens should end at t = 9 and s = 9, got 8 and 8"),
    (ONE | {"cu_seqlens_q": lengths(0, 5, 4, 9)}, r"cu_seqlens_q should rise from 0, got \[0, 5, 4, 9\]"),
    (given(b=1, t=2) | {"cu_seqlens_q": lengths(0, 2)}, r"cu_seqlens_k should be given where t and s differ"),
    (
        ONE | window(8, 1) | {"cu_seqlens_q": lengths(0, 9)},
        r"k_win should hold the s = 9 keys that are packed in k, got 8",
    ),
    (
        ONE | {"cu_seqlens_q": lengths(0, 6, 9), "cu_seqlens_k": lengths(0, 5, 9)},
        r"should have t <= s, got t = 6, s = 5",
    ),
    (
        ONE | {"cu_seqlens_q": lengths(0, 9), "cu_seqlens_k": lengths(0, 5, 9)},
        r"cu_seqlens_q and cu_seqlens_k should name as many sequences, got 1 and 2",
    ),
]


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(("changes", "message"), FAULTS)
def test_a_fault_is_one_clear_line(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        native_sparse_attention(**{**given(), "config": SMALL, **changes})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [1, 9, 40], ids="{} tokens".format)
@pytest.mark.parametrize("name", ["q", "k", "v", "k_cmp", "v_cmp", "k_win", "v_win"])
def test_another_dtype_is_refused_at_every_length(name, length):
    """Short sequences and long ones are computed in different ways."""
    blocks = SMALL.num_compressed_blocks(length)
    tensors = given(t=length, s=length) | window(length)
    tensors |= {"k_cmp": zeros(2, blocks, 2, 3), "v_cmp": zeros(2, blocks, 2, 5)}
    tensors[name] = tensors[name].bfloat16()
    with pytest.raises(ValueError, match="should have q's dtype"):
        native_sparse_attention(**tensors, config=SMALL)


@pytest.mark.parametrize("scale", [0.0, -0.5, float("inf"), float("nan")])
@pytest.mark.parametrize(
    "op",
    [
        lambda q, k, scale: causal_attention(q, k, k, scale=scale),
        lambda q, k, scale: window_attention(q, k, k, 6, scale=scale),
        lambda q, k, scale: compressed_attention(q, k[:, :3], k[:, :3], SMALL, scale=scale),
        lambda q, k, scale: selected_attention(q, k, k, zeros(2, 9, 2, 4).int(), SMALL, scale=scale),
        lambda q, k, scale: select_blocks(q, k[:, :3], SMALL, scale=scale),
        lambda q, k, scale: block_scores(q, k[:, :3], SMALL, scale=scale),
    ],
)
def test_no_operation_takes_a_scale_that_is_not_above_0(op, scale):
    with pytest.raises(ValueError, match="scale should be a finite number above 0"):
        op(zeros(2, 9, 4, 3), zeros(2, 9, 2, 3), scale)
