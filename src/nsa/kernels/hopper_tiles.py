"""Pieces that the kernels for Hopper share: what tiles.py is to the plain ones, and copies by descriptor.

Queries and keys have D = DP + DR columns, of which the last DR (none, or 64 of 192) lie in buffers of their own.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def locate(
    pid, row, cu_q, cu_k, key_start, lengths, tile_sequence, tile_first, num_queries, num_keys, LAYOUT: gl.constexpr
):
    """`tiles.locate`: tile number in its sequence, first query column, queries, raw keys, first row of the keys."""
    if LAYOUT == 1:
        sequence = gl.load(tile_sequence + pid)
        tile = pid - gl.load(tile_first + sequence)
        q_start = gl.load(cu_q + sequence)
        t = gl.load(cu_q + sequence + 1) - q_start
        s = gl.load(cu_k + sequence + 1) - gl.load(cu_k + sequence)
        k_start = gl.load(key_start + sequence)
    else:
        tile = pid
        q_start = pid * 0
        t = num_queries
        s = gl.load(lengths + row) if LAYOUT == 2 else num_keys
        k_start = pid * 0
    return tile, q_start, t, s, k_start


@gluon.jit
def start_copies(
    k_desc, rest_desc, v_desc, k_bufs, rest_bufs, v_bufs, bars, row, group,
    D: gl.constexpr, DR: gl.constexpr, E: gl.constexpr, i, pred, STAGES: gl.constexpr,
):  # fmt: skip
    """Copy the i-th tile of keys and values, whose first row is given, into its buffers."""
    at = i % STAGES
    nbytes: gl.constexpr = k_desc.block_type.nbytes + v_desc.block_type.nbytes
    if DR > 0:
        mbarrier.expect(bars.index(at), nbytes + rest_desc.block_type.nbytes, pred=pred)
        column = group * D + (D - DR)
        tma.async_copy_global_to_shared(rest_desc, [row, column], bars.index(at), rest_bufs.index(at), pred=pred)
    else:
        mbarrier.expect(bars.index(at), nbytes, pred=pred)
    tma.async_copy_global_to_shared(k_desc, [row, group * D], bars.index(at), k_bufs.index(at), pred=pred)
    tma.async_copy_global_to_shared(v_desc, [row, group * E], bars.index(at), v_bufs.index(at), pred=pred)


@gluon.jit
def start_scores(q_buf, q_rest, k_buf, k_rest, zeros, DR: gl.constexpr):
    """q k^T, not waited for."""
    scores = warpgroup_mma(q_buf, k_buf.permute((1, 0)), zeros, use_acc=False, is_async=True)
    if DR > 0:
        scores = warpgroup_mma(q_rest, k_rest.permute((1, 0)), scores, is_async=True)
    return scores


@gluon.jit
def wait_for_scores(q_buf, q_rest, k_buf, k_rest, zeros, DR: gl.constexpr):
    if DR > 0:
        scores = start_scores(q_buf, q_rest, k_buf, k_rest, zeros, DR)
        scores = warpgroup_mma_wait(0, deps=[scores])
    else:
        scores = warpgroup_mma(q_buf, k_buf.permute((1, 0)), zeros, use_acc=False)
    return scores


@gluon.jit
def load_queries(
    q_buf, q, row, q_start, first, t, s, group, stride_qb, stride_qt, stride_qh,
    G: gl.constexpr, GP: gl.constexpr, D: gl.constexpr, ROWS: gl.constexpr, LOAD: gl.constexpr,
):  # fmt: skip
    """Rows are queries x heads of the group, 0 where they do not exist or are padding."""
    wide = gl.to_tensor(0).to(gl.int64)
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LOAD))
    d = gl.arange(0, D, layout=gl.SliceLayout(0, LOAD))
    q_rows = q + row * (wide + stride_qb) + (q_start + first) * (wide + stride_qt) + group * G * (wide + stride_qh)
    q_rows = q_rows + (rows // GP) * (wide + stride_qt) + (rows % GP) * (wide + stride_qh)
    column = first + rows // GP
    mask = (column < t) & (s - t + column >= 0) & (rows % GP < G)
    q_buf.store(gl.load(q_rows[:, None] + d[None, :], mask=mask[:, None], other=0.0))
    fence_async_shared()


@gluon.jit
def load_masked(buf, x, base, end, stride, D: gl.constexpr, BLOCK_N: gl.constexpr, LOAD: gl.constexpr):
    """Rows base to end of x, at most BLOCK_N, 0 after them."""
    wide = gl.to_tensor(0).to(gl.int64)
    key = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, LOAD))
    d = gl.arange(0, D, layout=gl.SliceLayout(0, LOAD))
    at = x + ((base + key) * (wide + stride))[:, None] + d[None, :]
    buf.store(gl.load(at, mask=(base + key < end)[:, None], other=0.0))


@gluon.jit
def softmax(scores, total, top, attends, scale_log2):
    """p, total, top and the factor of what came before, where a row sees all that is not -inf, or nothing."""
    new_top = gl.where(attends, gl.maximum(top, gl.max(scores, 1) * scale_log2), top)
    # A row that has seen nothing: not -inf - -inf.
    reference = gl.where(new_top == float("-inf"), 0.0, new_top)
    p = gl.exp2(scores * scale_log2 - gl.where(attends, reference, float("inf"))[:, None])
    factor = gl.exp2(top - reference)
    return p, total * factor + gl.sum(p, 1), new_top, factor


@gluon.jit
def softmax_seen(scores, total, top, scale_log2):
    """`softmax` where every row sees every key."""
    new_top = gl.maximum(top, gl.max(scores, 1) * scale_log2)
    p = gl.exp2(scores * scale_log2 - new_top[:, None])
    factor = gl.exp2(top - new_top)
    return p, total * factor + gl.sum(p, 1), new_top, factor


@gluon.jit
def store_result(
    acc, total, top, buf, out, lse, row, q_start, first, t, group, groups, num_queries,
    G: gl.constexpr, GP: gl.constexpr, E: gl.constexpr, ROWS: gl.constexpr, LOAD: gl.constexpr,
    S_ROWS: gl.constexpr, O_ROWS: gl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp (natural); 0 and -inf for a row without keys."""
    wide = gl.to_tensor(0).to(gl.int64)
    rows = gl.arange(0, ROWS, layout=S_ROWS)
    empty = total == 0.0
    divisor = gl.where(empty, 1.0, total)
    row_lse = gl.where(empty, float("-inf"), (top + gl.log2(divisor)) * 0.6931471805599453)
    heads = groups * G
    out_rows = (row * (wide + num_queries) + q_start + first) * heads + group * G
    mask = (first + rows // GP < t) & (rows % GP < G)
    gl.store(lse + out_rows + (rows // GP) * heads + rows % GP, row_lse, mask=mask)
    result = acc * gl.convert_layout(1.0 / divisor, O_ROWS)[:, None]
    # Through shared memory, so that rows are written whole.
    buf.store(result.to(out.dtype.element_ty))
    result = buf.load(LOAD)
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LOAD))
    e = gl.arange(0, E, layout=gl.SliceLayout(0, LOAD))
    mask = (first + rows // GP < t) & (rows % GP < G)
    at = out + out_rows * E + (((rows // GP) * heads + rows % GP) * E)[:, None] + e[None, :]
    gl.store(at, result, mask=mask[:, None])
