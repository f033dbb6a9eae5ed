"""Forward attention for Hopper, in Gluon: the compressed branch and the selected one.

As `contiguous_forward` and `selected_forward`, with what Triton's compiler does not do: the tensor cores compute the
scores of the next tile while this tile's softmax runs, and one thread copies tiles of keys and values by descriptor,
so that no registers hold addresses. Tiles that some query sees in part are few; they come last, with masks.
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
def _start_copies(
    k_desc, v_desc, k_bufs, v_bufs, bars, row, group, D: gl.constexpr, E: gl.constexpr, i, pred, STAGES: gl.constexpr
):
    """Copy the i-th tile of keys and values, whose first row is given, into its buffers."""
    at = i % STAGES
    mbarrier.expect(bars.index(at), k_desc.block_type.nbytes + v_desc.block_type.nbytes, pred=pred)
    tma.async_copy_global_to_shared(k_desc, [row, group * D], bars.index(at), k_bufs.index(at), pred=pred)
    tma.async_copy_global_to_shared(v_desc, [row, group * E], bars.index(at), v_bufs.index(at), pred=pred)


@gluon.jit
def _load_queries(
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
def _load_masked(buf, x, base, end, stride, D: gl.constexpr, BLOCK_N: gl.constexpr, LOAD: gl.constexpr):
    """Rows base to end of x, at most BLOCK_N, 0 after them."""
    wide = gl.to_tensor(0).to(gl.int64)
    key = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, LOAD))
    d = gl.arange(0, D, layout=gl.SliceLayout(0, LOAD))
    at = x + ((base + key) * (wide + stride))[:, None] + d[None, :]
    buf.store(gl.load(at, mask=(base + key < end)[:, None], other=0.0))


@gluon.jit
def _softmax(scores, total, top, attends, scale_log2):
    """p, total, top and the factor of what came before, where a row sees all that is not -inf, or nothing."""
    new_top = gl.where(attends, gl.maximum(top, gl.max(scores, 1) * scale_log2), top)
    # A row that has seen nothing: not -inf - -inf.
    reference = gl.where(new_top == float("-inf"), 0.0, new_top)
    p = gl.exp2(scores * scale_log2 - gl.where(attends, reference, float("inf"))[:, None])
    factor = gl.exp2(top - reference)
    return p, total * factor + gl.sum(p, 1), new_top, factor


@gluon.jit
def _softmax_seen(scores, total, top, scale_log2):
    """`_softmax` where every row sees every key."""
    new_top = gl.maximum(top, gl.max(scores, 1) * scale_log2)
    p = gl.exp2(scores * scale_log2 - new_top[:, None])
    factor = gl.exp2(top - new_top)
    return p, total * factor + gl.sum(p, 1), new_top, factor


@gluon.jit
def _store_result(
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


@gluon.jit(do_not_specialize=["num_queries", "num_keys"])
def selected_forward_hopper_kernel(
    q, k, v, k_desc, v_desc, items, counts, out, lse, cu_q, cu_k, key_start, lengths, tile_sequence, tile_first,
    num_queries, num_keys, scale_log2, stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kg,
    stride_vb, stride_vs, stride_vg,
    G: gl.constexpr, GP: gl.constexpr, D: gl.constexpr, E: gl.constexpr, SELECT: gl.constexpr, N: gl.constexpr,
    LAYOUT: gl.constexpr, BLOCK_Q: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    ROWS: gl.constexpr = BLOCK_Q * GP
    WARPS: gl.constexpr = gl.num_warps()
    dtype: gl.constexpr = k_desc.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, SELECT, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, E, 16])
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    O_ROWS: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    LOAD_D: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [WARPS, 1], [1, 0])
    LOAD_E: gl.constexpr = gl.BlockedLayout([1, 8], [256 // E, E // 8], [WARPS, 1], [1, 0])

    pid, group, row = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    groups = gl.num_programs(1)
    wide = gl.to_tensor(0).to(gl.int64)
    tile, q_start, t, s, k_start = locate(
        pid, row, cu_q, cu_k, key_start, lengths, tile_sequence, tile_first, num_queries, num_keys, LAYOUT
    )
    first = tile * BLOCK_Q
    if first >= t:
        return

    k_bufs = gl.allocate_shared_memory(dtype, [STAGES, SELECT, D], k_desc.layout)
    v_bufs = gl.allocate_shared_memory(dtype, [STAGES, SELECT, E], v_desc.layout)
    q_buf = gl.allocate_shared_memory(dtype, [ROWS, D], k_desc.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(bars.index(stage), count=1)
    fence_async_shared()

    # See unions.py: blocks that end at or before the first query come first, a bit for each query in the low half.
    out_tile = (row * (wide + 1) * gl.num_programs(0) + pid) * groups + group
    tile_items = items + out_tile * (BLOCK_Q * N)
    num_past = gl.load(counts + 2 * out_tile)
    num_items = gl.load(counts + 2 * out_tile + 1)
    key_row = k_start if LAYOUT == 1 else row * num_keys
    for stage in gl.static_range(STAGES):
        base = (gl.load(tile_items + stage, mask=stage < num_past, other=0) >> 32).to(gl.int32) * SELECT
        _start_copies(
            k_desc, v_desc, k_bufs, v_bufs, bars, key_row + base, group, D, E, stage, stage < num_past, STAGES
        )
    _load_queries(
        q_buf, q, row, q_start, first, t, s, group, stride_qb, stride_qt, stride_qh, G, GP, D, ROWS, LOAD_D
    )  # fmt: skip

    query = gl.arange(0, ROWS, layout=S_ROWS) // GP
    zeros = gl.zeros([ROWS, SELECT], gl.float32, S_LAYOUT)
    acc = gl.zeros([ROWS, E], gl.float32, O_LAYOUT)
    total = gl.zeros([ROWS], gl.float32, S_ROWS)
    top = gl.full([ROWS], float("-inf"), gl.float32, S_ROWS)
    if num_past > 0:
        mbarrier.wait(bars.index(0), 0)
        scores = warpgroup_mma(q_buf, k_bufs.index(0).permute((1, 0)), zeros, use_acc=False)
        # Items are loaded before they are needed, too.
        item = gl.load(tile_items)
        next_item = gl.load(tile_items + 1, mask=num_past > 1, other=0)
        ahead_item = gl.load(tile_items + STAGES, mask=num_past > STAGES, other=0)
        for i in range(num_past - 1):
            j = i + 1
            mbarrier.wait(bars.index(j % STAGES), (j // STAGES) & 1)
            next_scores = warpgroup_mma(
                q_buf, k_bufs.index(j % STAGES).permute((1, 0)), zeros, use_acc=False, is_async=True
            )
            base = (ahead_item >> 32).to(gl.int32) * SELECT
            attends = (((item & 0x7FFFFFFF).to(gl.int32) >> query) & 1) > 0
            item = next_item
            next_item = gl.load(tile_items + i + 2, mask=i + 2 < num_past, other=0)
            ahead_item = gl.load(tile_items + i + 1 + STAGES, mask=i + 1 + STAGES < num_past, other=0)
            p, total, top, factor = _softmax(scores, total, top, attends, scale_log2)
            acc = acc * gl.convert_layout(factor, O_ROWS)[:, None]
            p = gl.convert_layout(p.to(dtype), P_LAYOUT)
            pending = warpgroup_mma(p, v_bufs.index(i % STAGES), acc, is_async=True)
            acc, scores, p = warpgroup_mma_wait(0, deps=[pending, next_scores, p])
            ahead = i + STAGES
            _start_copies(
                k_desc, v_desc, k_bufs, v_bufs, bars, key_row + base, group, D, E, ahead, ahead < num_past, STAGES
            )  # fmt: skip
        end = num_past - 1
        attends = (((item & 0x7FFFFFFF).to(gl.int32) >> query) & 1) > 0
        p, total, top, factor = _softmax(scores, total, top, attends, scale_log2)
        acc = acc * gl.convert_layout(factor, O_ROWS)[:, None]
        acc = warpgroup_mma(gl.convert_layout(p.to(dtype), P_LAYOUT), v_bufs.index(end % STAGES), acc)

    position = gl.where(first + query < t, s - t + first + query, -1)
    keys = gl.arange(0, SELECT, layout=gl.SliceLayout(0, S_LAYOUT))
    k_rows = k + row * (wide + stride_kb) + k_start * (wide + stride_ks) + group * (wide + stride_kg)
    v_rows = v + row * (wide + stride_vb) + k_start * (wide + stride_vs) + group * (wide + stride_vg)
    for i in range(num_past, num_items):
        item = gl.load(tile_items + i)
        base = (item >> 32).to(gl.int32) * SELECT
        _load_masked(k_bufs.index(0), k_rows, base, s, stride_ks, D, SELECT, LOAD_D)
        _load_masked(v_bufs.index(0), v_rows, base, s, stride_vs, E, SELECT, LOAD_E)
        fence_async_shared()
        scores = warpgroup_mma(q_buf, k_bufs.index(0).permute((1, 0)), zeros, use_acc=False)
        attends = (((item & 0x7FFFFFFF).to(gl.int32) >> query) & 1) > 0
        visible = ((base + keys)[None, :] <= position[:, None]) & attends[:, None]
        scores = gl.where(visible, scores, float("-inf"))
        p, total, top, factor = _softmax(scores, total, top, attends, scale_log2)
        acc = acc * gl.convert_layout(factor, O_ROWS)[:, None]
        acc = warpgroup_mma(gl.convert_layout(p.to(dtype), P_LAYOUT), v_bufs.index(0), acc)
    _store_result(
        acc, total, top, q_buf, out, lse, row, q_start, first, t, group, groups, num_queries,
        G, GP, E, ROWS, LOAD_E, S_ROWS, O_ROWS,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["num_queries", "num_keys", "key_rows"])
def compressed_forward_hopper_kernel(
    q, k, v, k_desc, v_desc, out, lse, cu_q, cu_k, key_start, lengths, tile_sequence, tile_first,
    num_queries, num_keys, key_rows, scale_log2, stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kg,
    stride_vb, stride_vs, stride_vg,
    G: gl.constexpr, GP: gl.constexpr, D: gl.constexpr, E: gl.constexpr, BLOCK: gl.constexpr, STRIDE: gl.constexpr,
    LAYOUT: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    ROWS: gl.constexpr = BLOCK_Q * GP
    WARPS: gl.constexpr = gl.num_warps()
    dtype: gl.constexpr = k_desc.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, E, 16])
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    O_ROWS: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    LOAD_D: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [WARPS, 1], [1, 0])
    LOAD_E: gl.constexpr = gl.BlockedLayout([1, 8], [256 // E, E // 8], [WARPS, 1], [1, 0])

    pid, group, row = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    if LAYOUT != 1:
        pid = gl.num_programs(0) - 1 - pid  # the longest ranges first
    groups = gl.num_programs(1)
    wide = gl.to_tensor(0).to(gl.int64)
    tile, q_start, t, s, k_start = locate(
        pid, row, cu_q, cu_k, key_start, lengths, tile_sequence, tile_first, num_queries, num_keys, LAYOUT
    )
    first = tile * BLOCK_Q
    if first >= t:
        return

    k_bufs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], k_desc.layout)
    v_bufs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, E], v_desc.layout)
    q_buf = gl.allocate_shared_memory(dtype, [ROWS, D], k_desc.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(bars.index(stage), count=1)
    fence_async_shared()

    # See tiles.keys_seen. Tiles of keys before num_past are seen by every query.
    last = gl.minimum(first + BLOCK_Q, t) - 1
    high_first = gl.maximum(s - t + first + (1 - BLOCK + STRIDE), 0) // STRIDE
    high_last = gl.maximum(s - t + last + (1 - BLOCK + STRIDE), 0) // STRIDE
    num_past = high_first // BLOCK_N
    key_row = row * key_rows + k_start
    for stage in gl.static_range(STAGES):
        base = key_row + stage * BLOCK_N
        _start_copies(k_desc, v_desc, k_bufs, v_bufs, bars, base, group, D, E, stage, stage < num_past, STAGES)
    _load_queries(
        q_buf, q, row, q_start, first, t, s, group, stride_qb, stride_qt, stride_qh, G, GP, D, ROWS, LOAD_D
    )  # fmt: skip

    query = gl.arange(0, ROWS, layout=S_ROWS) // GP
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, S_LAYOUT)
    acc = gl.zeros([ROWS, E], gl.float32, O_LAYOUT)
    total = gl.zeros([ROWS], gl.float32, S_ROWS)
    top = gl.full([ROWS], float("-inf"), gl.float32, S_ROWS)
    if num_past > 0:
        mbarrier.wait(bars.index(0), 0)
        scores = warpgroup_mma(q_buf, k_bufs.index(0).permute((1, 0)), zeros, use_acc=False)
        for i in range(num_past - 1):
            j = i + 1
            mbarrier.wait(bars.index(j % STAGES), (j // STAGES) & 1)
            next_scores = warpgroup_mma(
                q_buf, k_bufs.index(j % STAGES).permute((1, 0)), zeros, use_acc=False, is_async=True
            )
            p, total, top, factor = _softmax_seen(scores, total, top, scale_log2)
            acc = acc * gl.convert_layout(factor, O_ROWS)[:, None]
            p = gl.convert_layout(p.to(dtype), P_LAYOUT)
            pending = warpgroup_mma(p, v_bufs.index(i % STAGES), acc, is_async=True)
            acc, scores, p = warpgroup_mma_wait(0, deps=[pending, next_scores, p])
            ahead = i + STAGES
            base = key_row + ahead * BLOCK_N
            _start_copies(k_desc, v_desc, k_bufs, v_bufs, bars, base, group, D, E, ahead, ahead < num_past, STAGES)
        end = num_past - 1
        p, total, top, factor = _softmax_seen(scores, total, top, scale_log2)
        acc = acc * gl.convert_layout(factor, O_ROWS)[:, None]
        acc = warpgroup_mma(gl.convert_layout(p.to(dtype), P_LAYOUT), v_bufs.index(end % STAGES), acc)

    high = gl.where(first + query < t, gl.maximum(s - t + first + query + (1 - BLOCK + STRIDE), 0) // STRIDE, 0)
    keys = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, S_LAYOUT))
    k_rows = k + row * (wide + stride_kb) + k_start * (wide + stride_ks) + group * (wide + stride_kg)
    v_rows = v + row * (wide + stride_vb) + k_start * (wide + stride_vs) + group * (wide + stride_vg)
    for base in range(num_past * BLOCK_N, high_last, BLOCK_N):
        _load_masked(k_bufs.index(0), k_rows, base, high_last, stride_ks, D, BLOCK_N, LOAD_D)
        _load_masked(v_bufs.index(0), v_rows, base, high_last, stride_vs, E, BLOCK_N, LOAD_E)
        fence_async_shared()
        scores = warpgroup_mma(q_buf, k_bufs.index(0).permute((1, 0)), zeros, use_acc=False)
        scores = gl.where((base + keys)[None, :] < high[:, None], scores, float("-inf"))
        p, total, top, factor = _softmax(scores, total, top, query >= 0, scale_log2)
        acc = acc * gl.convert_layout(factor, O_ROWS)[:, None]
        acc = warpgroup_mma(gl.convert_layout(p.to(dtype), P_LAYOUT), v_bufs.index(0), acc)
    _store_result(
        acc, total, top, q_buf, out, lse, row, q_start, first, t, group, groups, num_queries,
        G, GP, E, ROWS, LOAD_E, S_ROWS, O_ROWS,
    )  # fmt: skip
