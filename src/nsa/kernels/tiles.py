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


# A tile of queries or keys is a tuple, for a width may be the sum of two powers of two (192 = 128 + 64): its first DP
# columns and, where DR > 0, the DR after them. Products are sums of two products, and nothing is padded to 256.


@triton.jit
def columns(rows, DP: tl.constexpr, DR: tl.constexpr):
    """Pointers [rows, 1] to the beginnings of rows -> to their columns."""
    main = rows + tl.arange(0, DP)[None, :]
    return (main,) if DR == 0 else (main, rows + (DP + tl.arange(0, DR))[None, :])


@triton.jit
def load_columns(
    pointers, offset, row_mask, MASK_ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DR: tl.constexpr
):  # fmt: skip
    """`load_rows` of all columns, `offset` behind the pointers."""
    main = load_rows(pointers[0] + offset, row_mask, tl.arange(0, DP) < D, MASK_ROWS, D < DP)
    return (main,) if DR == 0 else (main, _load_rest(pointers[1] + offset, row_mask, MASK_ROWS, D - DP, DR))


@triton.jit
def _load_rest(pointers, row_mask, MASK_ROWS: tl.constexpr, REST: tl.constexpr, DR: tl.constexpr):
    return load_rows(pointers, row_mask, tl.arange(0, DR) < REST, MASK_ROWS, REST < DR)


@triton.jit
def dot_columns(x, y, DR: tl.constexpr, PRECISION: tl.constexpr):
    """x y^T, [rows of x, rows of y]."""
    total = tl.dot(x[0], tl.trans(y[0]), input_precision=PRECISION)
    if DR > 0:
        total = tl.dot(x[1], tl.trans(y[1]), total, input_precision=PRECISION)
    return total


@triton.jit
def zero_columns(ROWS: tl.constexpr, DP: tl.constexpr, DR: tl.constexpr):
    main = tl.zeros([ROWS, DP], tl.float32)
    return (main,) if DR == 0 else (main, tl.zeros([ROWS, DR], tl.float32))


@triton.jit
def add_product(acc, p, x, DR: tl.constexpr, PRECISION: tl.constexpr):
    """acc + p x, p [rows of acc, rows of x] rounded to x's dtype."""
    p = p.to(x[0].dtype)
    main = tl.dot(p, x[0], acc[0], input_precision=PRECISION)
    return (main,) if DR == 0 else (main, tl.dot(p, x[1], acc[1], input_precision=PRECISION))


@triton.jit
def keep_rows(acc, mask, DR: tl.constexpr):
    """0 where masked."""
    main = tl.where(mask[:, None], acc[0], 0.0)
    return (main,) if DR == 0 else (main, tl.where(mask[:, None], acc[1], 0.0))


@triton.jit
def store_columns(
    pointers, acc, factor, row_mask, D: tl.constexpr, DP: tl.constexpr, DR: tl.constexpr, ADD: tl.constexpr = False
):  # fmt: skip
    """Stores acc * factor, added to what is there if ADD."""
    _store(pointers[0], acc[0] * factor, row_mask, D, DP, ADD)
    if DR > 0:
        _store(pointers[1], acc[1] * factor, row_mask, D - DP, DR, ADD)


@triton.jit
def _store(pointers, x, row_mask, WIDTH: tl.constexpr, PADDED: tl.constexpr, ADD: tl.constexpr):
    mask = row_mask[:, None] & (tl.arange(0, PADDED) < WIDTH)[None, :]
    if ADD:
        x += tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    tl.store(pointers, x.to(pointers.dtype.element_ty), mask=mask)


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
