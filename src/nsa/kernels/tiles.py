"""Pieces that the kernels share: whose tile this is, which keys a row sees, rows of queries x heads.

Positions are those of the queries in their sequence. The key with index i stands for the raw tokens
[i * stride, i * stride + block), so the query at position p sees the keys [0, high(p)), or the last `window` of them;
with block = stride = 1 the keys are the raw ones.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def locate(
    pid, row, cu_q, cu_k, key_start, lengths, tile_sequence, tile_first, num_queries, num_keys, LAYOUT: tl.constexpr
):
    """Tile number in its sequence, first query column, queries, raw keys, first row of the keys."""
    if LAYOUT == 1:
        sequence = tl.load(tile_sequence + pid)
        tile = pid - tl.load(tile_first + sequence)
        q_start = tl.load(cu_q + sequence)
        t = tl.load(cu_q + sequence + 1) - q_start
        s = tl.load(cu_k + sequence + 1) - tl.load(cu_k + sequence)
        k_start = tl.load(key_start + sequence)
    else:
        tile = pid
        q_start = pid * 0
        t = num_queries
        s = tl.load(lengths + row) if LAYOUT == 2 else num_keys
        k_start = pid * 0
    return tile, q_start, t, s, k_start


@triton.jit
def wide(x):
    """int64, for products with strides: a row or a head times its stride may pass 2^31."""
    return tl.full([], 0, tl.int64) + x


@triton.jit
def keys_seen(position, BLOCK: tl.constexpr, STRIDE: tl.constexpr):
    """high(p): how many keys end at or before a position; 0 for padding."""
    return tl.maximum(position + (1 - BLOCK + STRIDE), 0) // STRIDE


@triton.jit
def load_rows(pointers, row_mask, column_mask, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr):
    """A tile [rows, columns], 0 where masked; a mask that is never needed is not tested."""
    if MASK_ROWS and MASK_COLUMNS:
        x = tl.load(pointers, mask=row_mask[:, None] & column_mask[None, :], other=0.0)
    elif MASK_ROWS:
        x = tl.load(pointers, mask=row_mask[:, None], other=0.0)
    elif MASK_COLUMNS:
        x = tl.load(pointers, mask=column_mask[None, :], other=0.0)
    else:
        x = tl.load(pointers)
    return x


@triton.jit
def softmax_step(acc, total, top, scores, scale_log2, v, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """One tile of keys into the running softmax; masked scores are -inf."""
    new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
    # A row that has seen nothing: not -inf - -inf.
    reference = tl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top
    p = tl.exp2(scores * scale_log2 - reference[:, None])
    rescale = tl.exp2(top - reference)
    total = total * rescale + tl.sum(p, 1)
    acc = acc * rescale[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, total, new_top


@triton.jit
def softmax_end(acc, total, top):
    """Output and log-sum-exp (natural); 0 and -inf for a row without keys."""
    empty = total == 0.0
    divisor = tl.where(empty, 1.0, total)
    lse = tl.where(empty, float("-inf"), (top + tl.log2(divisor)) * LN2)
    return acc / divisor[:, None], lse


@triton.jit
def softmax_step_rows(acc, total, top, scores, scale_log2, v, attends, PRECISION: tl.constexpr):
    """`softmax_step` where a row sees all keys of the tile or none: no score is masked."""
    new_top = tl.where(attends, tl.maximum(top, tl.max(scores, 1) * scale_log2), top)
    reference = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(scores * scale_log2 - tl.where(attends, reference, float("inf"))[:, None])
    rescale = tl.exp2(top - reference)
    total = total * rescale + tl.sum(p, 1)
    acc = acc * rescale[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, total, new_top


@triton.jit
def log2_lse(lse):
    """lse in base 2; +inf for rows that saw nothing or do not exist (-inf), so that their probabilities are 0."""
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)


@triton.jit
def load_log2_lse(pointers, mask):
    return log2_lse(tl.load(pointers, mask=mask, other=float("-inf")))
