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
    warpgroup_mma,
    warpgroup_mma_wait,
)

from nsa.kernels.hopper_tiles import (
    load_masked,
    load_queries,
    locate,
    softmax,
    softmax_seen,
    start_copies,
    start_scores,
    store_result,
    wait_for_scores,
)


@gluon.jit(do_not_specialize=["num_queries", "num_keys"])
def selected_forward_hopper_kernel(
    q, k, v, k_desc, rest_desc, v_desc, items, counts, out, lse, cu_q, cu_k, key_start, lengths, tile_sequence,
    tile_first, num_queries, num_keys, scale_log2, stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kg,
    stride_vb, stride_vs, stride_vg,
    G: gl.constexpr, GP: gl.constexpr, DP: gl.constexpr, DR: gl.constexpr, E: gl.constexpr,
    SELECT: gl.constexpr, N: gl.constexpr, LAYOUT: gl.constexpr, BLOCK_Q: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    D: gl.constexpr = DP + DR
    ROWS: gl.constexpr = BLOCK_Q * GP
    WARPS: gl.constexpr = gl.num_warps()
    dtype: gl.constexpr = k_desc.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, SELECT, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, E, 16])
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    O_ROWS: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    LOAD_D: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DP, DP // 8], [WARPS, 1], [1, 0])
    LOAD_R: gl.constexpr = LOAD_D if DR == 0 else gl.BlockedLayout([1, 8], [256 // DR, DR // 8], [WARPS, 1], [1, 0])
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

    k_bufs = gl.allocate_shared_memory(dtype, [STAGES, SELECT, DP], k_desc.layout)
    v_bufs = gl.allocate_shared_memory(dtype, [STAGES, SELECT, E], v_desc.layout)
    q_buf = gl.allocate_shared_memory(dtype, [ROWS, DP], k_desc.layout)
    rest_bufs, q_rest = k_bufs, q_buf
    if DR > 0:
        rest_bufs = gl.allocate_shared_memory(dtype, [STAGES, SELECT, DR], rest_desc.layout)
        q_rest = gl.allocate_shared_memory(dtype, [ROWS, DR], rest_desc.layout)
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
        start_copies(
            k_desc,
            rest_desc,
            v_desc,
            k_bufs,
            rest_bufs,
            v_bufs,
            bars,
            key_row + base,
            group,
            D,
            DR,
            E,
            stage,
            stage < num_past,
            STAGES,
        )
    load_queries(
        q_buf, q, row, q_start, first, t, s, group, stride_qb, stride_qt, stride_qh, G, GP, DP, ROWS, LOAD_D
    )  # fmt: skip
    if DR > 0:
        load_queries(
            q_rest, q + DP, row, q_start, first, t, s, group, stride_qb, stride_qt, stride_qh, G, GP, DR, ROWS,
            LOAD_R,
        )  # fmt: skip

    query = gl.arange(0, ROWS, layout=S_ROWS) // GP
    zeros = gl.zeros([ROWS, SELECT], gl.float32, S_LAYOUT)
    acc = gl.zeros([ROWS, E], gl.float32, O_LAYOUT)
    total = gl.zeros([ROWS], gl.float32, S_ROWS)
    top = gl.full([ROWS], float("-inf"), gl.float32, S_ROWS)
    if num_past > 0:
        mbarrier.wait(bars.index(0), 0)
        scores = wait_for_scores(q_buf, q_rest, k_bufs.index(0), rest_bufs.index(0), zeros, DR)
        # Items are loaded before they are needed, too.
        item = gl.load(tile_items)
        next_item = gl.load(tile_items + 1, mask=num_past > 1, other=0)
        ahead_item = gl.load(tile_items + STAGES, mask=num_past > STAGES, other=0)
        for i in range(num_past - 1):
            j = i + 1
            mbarrier.wait(bars.index(j % STAGES), (j // STAGES) & 1)
            next_scores = start_scores(q_buf, q_rest, k_bufs.index(j % STAGES), rest_bufs.index(j % STAGES), zeros, DR)
            base = (ahead_item >> 32).to(gl.int32) * SELECT
            attends = (((item & 0x7FFFFFFF).to(gl.int32) >> query) & 1) > 0
            item = next_item
            next_item = gl.load(tile_items + i + 2, mask=i + 2 < num_past, other=0)
            ahead_item = gl.load(tile_items + i + 1 + STAGES, mask=i + 1 + STAGES < num_past, other=0)
            p, total, top, factor = softmax(scores, total, top, attends, scale_log2)
            acc = acc * gl.convert_layout(factor, O_ROWS)[:, None]
            p = gl.convert_layout(p.to(dtype), P_LAYOUT)
            pending = warpgroup_mma(p, v_bufs.index(i % STAGES), acc, is_async=True)
            acc, scores, p = warpgroup_mma_wait(0, deps=[pending, next_scores, p])
            ahead = i + STAGES
            start_copies(
                k_desc, rest_desc, v_desc, k_bufs, rest_bufs, v_bufs, bars, key_row + base, group, D, DR, E,
                ahead, ahead < num_past, STAGES,
            )  # fmt: skip
        end = num_past - 1
        attends = (((item & 0x7FFFFFFF).to(gl.int32) >> query) & 1) > 0
        p, total, top, factor = softmax(scores, total, top, attends, scale_log2)
        acc = acc * gl.convert_layout(factor, O_ROWS)[:, None]
        acc = warpgroup_mma(gl.convert_layout(p.to(dtype), P_LAYOUT), v_bufs.index(end % STAGES), acc)

    position = gl.where(first + query < t, s - t + first + query, -1)
    keys = gl.arange(0, SELECT, layout=gl.SliceLayout(0, S_LAYOUT))
    k_rows = k + row * (wide + stride_kb) + k_start * (wide + stride_ks) + group * (wide + stride_kg)
    v_rows = v + row * (wide + stride_vb) + k_start * (wide + stride_vs) + group * (wide + stride_vg)
    for i in range(num_past, num_items):
        item = gl.load(tile_items + i)
        base = (item >> 32).to(gl.int32) * SELECT
        load_masked(k_bufs.index(0), k_rows, base, s, stride_ks, DP, SELECT, LOAD_D)
        if DR > 0:
            load_masked(rest_bufs.index(0), k_rows + DP, base, s, stride_ks, DR, SELECT, LOAD_R)
        load_masked(v_bufs.index(0), v_rows, base, s, stride_vs, E, SELECT, LOAD_E)
        fence_async_shared()
        scores = wait_for_scores(q_buf, q_rest, k_bufs.index(0), rest_bufs.index(0), zeros, DR)
        attends = (((item & 0x7FFFFFFF).to(gl.int32) >> query) & 1) > 0
        visible = ((base + keys)[None, :] <= position[:, None]) & attends[:, None]
        scores = gl.where(visible, scores, float("-inf"))
        p, total, top, factor = softmax(scores, total, top, attends, scale_log2)
        acc = acc * gl.convert_layout(factor, O_ROWS)[:, None]
        acc = warpgroup_mma(gl.convert_layout(p.to(dtype), P_LAYOUT), v_bufs.index(0), acc)
    store_result(
        acc, total, top, q_buf, out, lse, row, q_start, first, t, group, groups, num_queries,
        G, GP, E, ROWS, LOAD_E, S_ROWS, O_ROWS,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["num_queries", "num_keys", "key_rows"])
def compressed_forward_hopper_kernel(
    q, k, v, k_desc, rest_desc, v_desc, out, lse, cu_q, cu_k, key_start, lengths, tile_sequence, tile_first,
    num_queries, num_keys, key_rows, scale_log2, stride_qb, stride_qt, stride_qh, stride_kb, stride_ks, stride_kg,
    stride_vb, stride_vs, stride_vg,
    G: gl.constexpr, GP: gl.constexpr, DP: gl.constexpr, DR: gl.constexpr, E: gl.constexpr,
    BLOCK: gl.constexpr, STRIDE: gl.constexpr, LAYOUT: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    D: gl.constexpr = DP + DR
    ROWS: gl.constexpr = BLOCK_Q * GP
    WARPS: gl.constexpr = gl.num_warps()
    dtype: gl.constexpr = k_desc.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, E, 16])
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    O_ROWS: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    LOAD_D: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DP, DP // 8], [WARPS, 1], [1, 0])
    LOAD_R: gl.constexpr = LOAD_D if DR == 0 else gl.BlockedLayout([1, 8], [256 // DR, DR // 8], [WARPS, 1], [1, 0])
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

    k_bufs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, DP], k_desc.layout)
    v_bufs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, E], v_desc.layout)
    q_buf = gl.allocate_shared_memory(dtype, [ROWS, DP], k_desc.layout)
    rest_bufs, q_rest = k_bufs, q_buf
    if DR > 0:
        rest_bufs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, DR], rest_desc.layout)
        q_rest = gl.allocate_shared_memory(dtype, [ROWS, DR], rest_desc.layout)
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
        start_copies(
            k_desc,
            rest_desc,
            v_desc,
            k_bufs,
            rest_bufs,
            v_bufs,
            bars,
            base,
            group,
            D,
            DR,
            E,
            stage,
            stage < num_past,
            STAGES,
        )
    load_queries(
        q_buf, q, row, q_start, first, t, s, group, stride_qb, stride_qt, stride_qh, G, GP, DP, ROWS, LOAD_D
    )  # fmt: skip
    if DR > 0:
        load_queries(
            q_rest, q + DP, row, q_start, first, t, s, group, stride_qb, stride_qt, stride_qh, G, GP, DR, ROWS,
            LOAD_R,
        )  # fmt: skip

    query = gl.arange(0, ROWS, layout=S_ROWS) // GP
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, S_LAYOUT)
    acc = gl.zeros([ROWS, E], gl.float32, O_LAYOUT)
    total = gl.zeros([ROWS], gl.float32, S_ROWS)
    top = gl.full([ROWS], float("-inf"), gl.float32, S_ROWS)
    if num_past > 0:
        mbarrier.wait(bars.index(0), 0)
        scores = wait_for_scores(q_buf, q_rest, k_bufs.index(0), rest_bufs.index(0), zeros, DR)
        for i in range(num_past - 1):
            j = i + 1
            mbarrier.wait(bars.index(j % STAGES), (j // STAGES) & 1)
            next_scores = start_scores(q_buf, q_rest, k_bufs.index(j % STAGES), rest_bufs.index(j % STAGES), zeros, DR)
            p, total, top, factor = softmax_seen(scores, total, top, scale_log2)
            acc = acc * gl.convert_layout(factor, O_ROWS)[:, None]
            p = gl.convert_layout(p.to(dtype), P_LAYOUT)
            pending = warpgroup_mma(p, v_bufs.index(i % STAGES), acc, is_async=True)
            acc, scores, p = warpgroup_mma_wait(0, deps=[pending, next_scores, p])
            ahead = i + STAGES
            base = key_row + ahead * BLOCK_N
            start_copies(
                k_desc,
                rest_desc,
                v_desc,
                k_bufs,
                rest_bufs,
                v_bufs,
                bars,
                base,
                group,
                D,
                DR,
                E,
                ahead,
                ahead < num_past,
                STAGES,
            )
        end = num_past - 1
        p, total, top, factor = softmax_seen(scores, total, top, scale_log2)
        acc = acc * gl.convert_layout(factor, O_ROWS)[:, None]
        acc = warpgroup_mma(gl.convert_layout(p.to(dtype), P_LAYOUT), v_bufs.index(end % STAGES), acc)

    high = gl.where(first + query < t, gl.maximum(s - t + first + query + (1 - BLOCK + STRIDE), 0) // STRIDE, 0)
    keys = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, S_LAYOUT))
    k_rows = k + row * (wide + stride_kb) + k_start * (wide + stride_ks) + group * (wide + stride_kg)
    v_rows = v + row * (wide + stride_vb) + k_start * (wide + stride_vs) + group * (wide + stride_vg)
    for base in range(num_past * BLOCK_N, high_last, BLOCK_N):
        load_masked(k_bufs.index(0), k_rows, base, high_last, stride_ks, DP, BLOCK_N, LOAD_D)
        if DR > 0:
            load_masked(rest_bufs.index(0), k_rows + DP, base, high_last, stride_ks, DR, BLOCK_N, LOAD_R)
        load_masked(v_bufs.index(0), v_rows, base, high_last, stride_vs, E, BLOCK_N, LOAD_E)
        fence_async_shared()
        scores = wait_for_scores(q_buf, q_rest, k_bufs.index(0), rest_bufs.index(0), zeros, DR)
        scores = gl.where((base + keys)[None, :] < high[:, None], scores, float("-inf"))
        p, total, top, factor = softmax(scores, total, top, query >= 0, scale_log2)
        acc = acc * gl.convert_layout(factor, O_ROWS)[:, None]
        acc = warpgroup_mma(gl.convert_layout(p.to(dtype), P_LAYOUT), v_bufs.index(0), acc)
    store_result(
        acc, total, top, q_buf, out, lse, row, q_start, first, t, group, groups, num_queries,
        G, GP, E, ROWS, LOAD_E, S_ROWS, O_ROWS,
    )  # fmt: skip
