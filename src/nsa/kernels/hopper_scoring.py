"""Scores of the selection blocks for Hopper, in Gluon: `selection.scoring_kernel`, with two heads in flight.

The tensor cores compute the scores of the next head while this head's probabilities are summed; queries are copied by
descriptor.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma_wait,
)

from nsa.kernels.hopper_tiles import load_masked, locate, start_scores, wait_for_scores


@gluon.jit
def _start_copy(
    q_desc, rest_desc, q_bufs, rest_bufs, bars, row, first_head, head,
    G: gl.constexpr, DP: gl.constexpr, DR: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copy a head's queries into its buffers."""
    at = head % STAGES
    bar, column = bars.index(at), (first_head + head) * (DP + DR)
    if DR > 0:
        mbarrier.expect(bar, q_desc.block_type.nbytes + rest_desc.block_type.nbytes, pred=head < G)
        tma.async_copy_global_to_shared(rest_desc, [row, column + DP], bar, rest_bufs.index(at), pred=head < G)
    else:
        mbarrier.expect(bar, q_desc.block_type.nbytes, pred=head < G)
    tma.async_copy_global_to_shared(q_desc, [row, column], bar, q_bufs.index(at), pred=head < G)


@gluon.jit
def _probabilities(scores, row_lse, scale_log2):
    """0 for rows that saw nothing or do not exist."""
    lse = gl.where(row_lse == float("-inf"), float("inf"), row_lse * 1.4426950408889634)
    return gl.exp2(scores * scale_log2 - lse[:, None])


@gluon.jit(do_not_specialize=["num_queries", "num_keys", "tile_offset", "num_blocks"])
def scoring_hopper_kernel(
    q_desc, rest_desc, k, lse, own, spill, cu_q, cu_k, key_start, lengths, tile_sequence, tile_first,
    num_queries, num_keys, tile_offset, num_blocks, num_groups, scale_log2, stride_kb, stride_ks, stride_kg,
    G: gl.constexpr, DP: gl.constexpr, DR: gl.constexpr, BLOCK: gl.constexpr, STRIDE: gl.constexpr,
    PER_BLOCK: gl.constexpr, LAYOUT: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    WARPS: gl.constexpr = gl.num_warps()
    dtype: gl.constexpr = q_desc.dtype
    BLOCKS: gl.constexpr = BLOCK_N // PER_BLOCK
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    S_COLUMNS: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    LOAD_D: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DP, DP // 8], [WARPS, 1], [1, 0])
    LOAD_R: gl.constexpr = LOAD_D if DR == 0 else gl.BlockedLayout([1, 8], [256 // DR, DR // 8], [WARPS, 1], [1, 0])
    group, row = gl.program_id(2) % num_groups, gl.program_id(2) // num_groups
    wide = gl.to_tensor(0).to(gl.int64)
    tile, q_start, t, s, k_start = locate(
        gl.program_id(0) + tile_offset,
        row,
        cu_q,
        cu_k,
        key_start,
        lengths,
        tile_sequence,
        tile_first,
        num_queries,
        num_keys,
        LAYOUT,
    )
    first = tile * BLOCK_Q
    if first >= t:
        return
    last = gl.minimum(first + BLOCK_Q, t) - 1
    first_block = gl.program_id(1) * BLOCKS
    high_last = gl.maximum(s - t + last + (1 - BLOCK + STRIDE), 0) // STRIDE
    if first_block * PER_BLOCK >= high_last:
        return
    k_buf = gl.allocate_shared_memory(dtype, [BLOCK_N, DP], q_desc.layout)
    q_bufs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_Q, DP], q_desc.layout)
    k_rest, rest_bufs = k_buf, q_bufs
    if DR > 0:
        k_rest = gl.allocate_shared_memory(dtype, [BLOCK_N, DR], rest_desc.layout)
        rest_bufs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_Q, DR], rest_desc.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(bars.index(stage), count=1)
    fence_async_shared()
    q_row = row * num_queries + q_start + first
    for stage in gl.static_range(STAGES):
        _start_copy(q_desc, rest_desc, q_bufs, rest_bufs, bars, q_row, group * G, stage, G, DP, DR, STAGES)
    k_rows = k + row * (wide + stride_kb) + group * (wide + stride_kg) + k_start * (wide + stride_ks)
    first_key = first_block * PER_BLOCK
    load_masked(k_buf, k_rows, first_key, high_last, stride_ks, DP, BLOCK_N, LOAD_D)
    if DR > 0:
        load_masked(k_rest, k_rows + DP, first_key, high_last, stride_ks, DR, BLOCK_N, LOAD_R)
    fence_async_shared()

    rows = gl.arange(0, BLOCK_Q, layout=S_ROWS)
    row_mask = first + rows < t
    heads = num_groups * G
    lse_rows = lse + (row * (wide + num_queries) + q_start + first) * heads + group * G + rows * heads
    zeros = gl.zeros([BLOCK_Q, BLOCK_N], gl.float32, S_LAYOUT)
    p_sum = gl.zeros([BLOCK_Q, BLOCK_N], gl.float32, S_LAYOUT)
    row_lse = gl.load(lse_rows, mask=row_mask, other=float("-inf"))
    mbarrier.wait(bars.index(0), 0)
    scores = wait_for_scores(q_bufs.index(0), rest_bufs.index(0), k_buf, k_rest, zeros, DR)
    for head in range(G - 1):
        j = head + 1
        mbarrier.wait(bars.index(j % STAGES), (j // STAGES) & 1)
        next_scores = start_scores(q_bufs.index(j % STAGES), rest_bufs.index(j % STAGES), k_buf, k_rest, zeros, DR)
        next_lse = gl.load(lse_rows + j, mask=row_mask, other=float("-inf"))
        p_sum += _probabilities(scores, row_lse, scale_log2)
        scores = warpgroup_mma_wait(0, deps=[next_scores])
        row_lse = next_lse
        ahead = head + STAGES
        _start_copy(q_desc, rest_desc, q_bufs, rest_bufs, bars, q_row, group * G, ahead, G, DP, DR, STAGES)
    p_sum += _probabilities(scores, row_lse, scale_log2)

    keys = first_block * PER_BLOCK + gl.arange(0, BLOCK_N, layout=S_COLUMNS)
    high = gl.maximum(s - t + first + rows + (1 - BLOCK + STRIDE), 0) // STRIDE
    p_sum = gl.where(keys[None, :] < high[:, None], p_sum, 0.0)
    inside = keys % PER_BLOCK
    overlap = gl.minimum(BLOCK // STRIDE, PER_BLOCK - inside)
    own_sum = gl.sum(gl.reshape(p_sum * overlap.to(gl.float32)[None, :], [BLOCK_Q, BLOCKS, PER_BLOCK]), 2)
    OUT: gl.constexpr = gl.BlockedLayout([1, 4], [32 // (BLOCKS // 4), BLOCKS // 4], [WARPS, 1], [1, 0])
    out_row = gl.arange(0, BLOCK_Q, layout=gl.SliceLayout(1, OUT))
    block = first_block + gl.arange(0, BLOCKS, layout=gl.SliceLayout(0, OUT))
    scratch_row = (gl.program_id(2) * (wide + gl.num_programs(0)) + gl.program_id(0)) * BLOCK_Q * num_blocks
    at = scratch_row + (out_row * num_blocks)[:, None] + block[None, :]
    mask = (first + out_row < t)[:, None] & (block < num_blocks)[None, :]
    gl.store(own + at, gl.convert_layout(own_sum, OUT), mask=mask)
    if BLOCK > STRIDE:
        rest = (BLOCK // STRIDE - overlap).to(gl.float32)
        rest_sum = gl.sum(gl.reshape(p_sum * rest[None, :], [BLOCK_Q, BLOCKS, PER_BLOCK]), 2)
        gl.store(spill + at, gl.convert_layout(rest_sum, OUT), mask=mask)
