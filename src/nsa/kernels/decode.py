"""Decoding over a cache on the kernels: `nsa.ops.decode`, in two launches for attention and one for appending.

Grids and memory follow from shapes alone, and nothing reads a length on the host, so both may be captured in a CUDA
graph. Lengths, block tables and counts are trusted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from nsa.cache_tensors import CacheTensors
from nsa.config import NSAConfig
from nsa.decode_step import DecodeStep
from nsa.kernels import launch
from nsa.kernels.decode_append import decode_append_kernel
from nsa.kernels.decode_finish import decode_finish_kernel
from nsa.kernels.decode_split import decode_split_kernel
from nsa.kernels.integers import cdiv, next_power_of_2
from nsa.kernels.launch import Heads
from nsa.kernels.start import strides_of
from nsa.streams import Branches

LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class Plan:
    """Sizes of the programs: none that a sum depends on depends on the batch or on the cache's length."""

    block_n: int = 128  # keys of a tile, at most
    warps: int = 4
    stages: int = 3
    splits: int = 16  # runs that a row's compressed keys are cut into, at most
    least_tiles: int = 2  # tiles in such a run, at least
    window_tiles: int = 4  # tiles in a run of the window
    chunk: int = 256  # blocks that one step of scoring takes: four of a head's sums for each of 128 threads
    select_blocks: int = 1024  # blocks that one step of the top n looks at, where there is more than a chunk
    shares: int = 4  # parts that the selected blocks of a query are cut into
    merges: int = 2  # programs that divide the columns of v between them to merge the first launch's splits
    finish_n: int = 128
    finish_warps: int = 4
    finish_stages: int = 3
    together: int = 2  # shares of a program where there are more than the device holds at once
    together_stages: int = 4
    registers: int = 168  # of a thread: three programs of four warps share a multiprocessor
    at_once: int = 2  # programs that a multiprocessor certainly holds, where its shared memory allows
    pdl: bool = True  # on Hopper and later, a launch may begin while the one before ends


PLAN = Plan()
# Queries x heads of a program: the fewest that the matrix units take.
TILE_ROWS = 16
# Rows (row, block, head) and units of a layer that a program of the append takes together.
ROWS, UNITS = 16, 16
# Bytes of keys and values in a tile, at most.
TILE_BYTES = 32768


def tile_keys(heads: Heads, q: Tensor, keys: int) -> int:
    """Keys in a tile for these widths."""
    # Tiles of 16-bit keys are not cut below 64: with 32, of wide heads, an earlier form of the kernels selected wrong
    # blocks on an H200 (docs/kernels.md).
    least = 64 if q.element_size() == 2 else 16
    while keys > least and keys * (heads.padded_d + heads.padded_e) * q.element_size() > TILE_BYTES:
        keys //= 2
    return keys


def tile_stages(heads: Heads, q: Tensor, keys: int, stages: int) -> int:
    """Stages, of which all but one are held, that leave room for the rest of a program."""
    held = keys * (heads.padded_d + heads.padded_e) * q.element_size()
    return stages if stages * held <= launch.shared_memory(q.device) else 2


@lru_cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0


@dataclass(frozen=True)
class Workspace:
    """What the two launches leave for each other, and for their last programs."""

    part_acc: Tensor
    part_top: Tensor
    part_total: Tensor
    sums: Tensor
    tops: Tensor
    scores: Tensor
    others: Tensor
    slc_acc: Tensor
    slc_top: Tensor
    slc_total: Tensor
    picks: Tensor
    bits: Tensor

    @staticmethod
    def of(device: torch.device, *sizes: int) -> "Workspace":
        """One allocation, cut; everything begins at a multiple of 64 bytes."""
        room = [-(-size // 16) * 16 for size in sizes]
        parts = list(torch.empty(sum(room), dtype=torch.float32, device=device).split(room))
        return Workspace(*parts[:-2], *(part.view(torch.int32) for part in parts[-2:]))


@torch.library.custom_op("nsa::decode_attention", mutates_args=("arrivals",))
def _decode_attention(
    q: Tensor, gates: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_win: Tensor | None,
    v_win: Tensor | None, block_table: Tensor, window_table: Tensor | None, lengths: Tensor, arrivals: Tensor,
    counts: Tensor | None, cos: Tensor | None, sin: Tensor | None, sizes: list[int], scale: float,
) -> Tensor:  # fmt: skip
    from nsa.kernels.library import _config, _serving  # a module that imports every kernel

    tensors = CacheTensors(k, v, k_cmp, v_cmp, k_win, v_win, k, v, block_table, lengths, arrivals, window_table)
    with _serving(q, k, v, k_cmp, v_cmp, scale=scale):
        return attend(q, gates, tensors, _config(sizes), scale, counts, cos, sin)[0]


@_decode_attention.register_fake
def _(q, gates, k, v, *_):
    return q.new_empty(*q.shape[:3], v.shape[3])


def decode_attention(
    q: Tensor,
    gates: Tensor,
    tensors: CacheTensors,
    config: NSAConfig,
    *,
    scale: float | None = None,
    counts: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> Tensor:
    """See `nsa.ops.decode.decode_attention`.

    Raises:
        ValueError: shapes that do not fit, or tensors that the kernels do not take.
    """
    from nsa.kernels.library import _serving, sizes_of

    tensors.check_queries(config, q, gates, counts)
    if q.shape[1] > tensors.arrivals.shape[2]:
        raise ValueError(f"decode_attention: expected at most {tensors.arrivals.shape[2]} queries, got {q.shape[1]}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not torch.compiler.is_compiling():
        # An operator of so many tensors would take longer to call than to run.
        with _serving(q, tensors.k, tensors.v, tensors.k_cmp, tensors.v_cmp, scale=scale):
            return attend(q, gates, tensors, config, scale, counts, cos, sin)[0]
    return _decode_attention(
        q, gates, tensors.k, tensors.v, tensors.k_cmp, tensors.v_cmp, tensors.k_win, tensors.v_win,
        tensors.block_table, tensors.window_table, tensors.lengths, tensors.arrivals, counts, cos, sin,
        sizes_of(config), scale,
    )  # fmt: skip


def attend(
    q: Tensor, gates: Tensor, tensors: CacheTensors, config: NSAConfig, scale: float,
    counts: Tensor | None = None, cos: Tensor | None = None, sin: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output, and picks int32 [b, t, g, NP >= n]: the blocks of queries that have more than n."""
    heads = Heads.of(q, tensors.k, tensors.v)
    b, t, h, _ = q.shape
    out = torch.empty((b, t, h, heads.e), dtype=q.dtype, device=q.device)
    padded_n = next_power_of_2(config.num_selected_blocks)
    if out.numel() == 0:
        return out, torch.empty((b, t, heads.g, padded_n), dtype=torch.int32, device=q.device)
    q, gates = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, gates))
    cos, sin = (None if x is None else x.contiguous() for x in (cos, sin))
    pdl = PLAN.pdl and launch.is_hopper(q.device)
    launch_pdl = {"launch_pdl": True} if pdl else {}
    stride, select, n = config.compress_stride, config.select_block_size, config.num_selected_blocks
    per_block = select // stride
    per_block_padded = next_power_of_2(per_block)
    keys = max(tile_keys(heads, q, PLAN.block_n), per_block_padded)
    tile_blocks = keys // per_block_padded
    tile_strides = tile_blocks * per_block
    group = heads.padded_group
    head_tiles, block_q = max(1, group // TILE_ROWS), max(1, TILE_ROWS // group)
    window_keys = PLAN.window_tiles * keys
    window_splits = cdiv(config.window_size + block_q - 1, window_keys)
    pages, page_size = tensors.block_table.shape[1], tensors.k.shape[1]
    # No more runs than the cache has room for: programs without work would cost more than some have.
    room = cdiv(pages * page_size // stride, tile_strides)
    runs = max(1, min(PLAN.splits, cdiv(room, PLAN.least_tiles)))
    parts = runs + window_splits
    # Rounded up, so that rows begin where wide loads may begin.
    num_tops = 16 * cdiv(room, 16)
    num_blocks = num_tops * tile_blocks

    rows, slots = b * t * h, 2 if config.compress_block_size > stride else 1
    work = Workspace.of(
        q.device, rows * parts * heads.e, rows * parts, rows * parts, rows * num_blocks * slots,
        rows * num_tops, b * t * heads.g * num_blocks, rows * heads.e,
        rows * PLAN.shares * heads.e, rows * PLAN.shares, rows * PLAN.shares,
        *[b * t * heads.g * padded_n] * 2,
    )  # fmt: skip
    shared = tensors.k_win is None
    k_win, v_win = (tensors.k, tensors.v) if shared else (tensors.k_win, tensors.v_win)
    window_table = tensors.block_table if tensors.window_table is None else tensors.window_table
    is_ring = not shared and tensors.window_table is None
    window_pages = window_table.shape[1]
    common = {
        "D": heads.d, "DP": heads.padded_d, "E": heads.e, "EP": heads.padded_e, "G": heads.per_group,
        "STRIDE": stride, "SELECT": select, "N": n, "NP": padded_n,
        "PAGE_TOKENS": 0 if pages == 1 else page_size, "ROTATE": cos is not None,
        "SPLITS": PLAN.splits, "SPLITS_PADDED": next_power_of_2(PLAN.splits), "LEAST_TILES": PLAN.least_tiles,
        "WINDOW_SPLITS": window_splits, "BLOCK_Q": block_q, "HEAD_TILES": head_tiles,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32", "PDL": pdl,
    }  # fmt: skip
    tiles = cdiv(t, block_q) * head_tiles
    # Wide heads fill a multiprocessor's shared memory with one program, which may then have all registers.
    wide = (heads.padded_d + heads.padded_e) * q.element_size() > 512
    registers = {"maxnreg": PLAN.registers} if PLAN.registers and not wide else {}
    stages = tile_stages(heads, q, keys, PLAN.stages)
    held = (stages - 1) * keys * (heads.padded_d + heads.padded_e) * q.element_size()
    at_once = min(PLAN.at_once, max(1, launch.shared_memory(q.device) // held)) * multiprocessors(q.device)
    # Programs that all run at the same time may wait for each other; and while all of them wait for the kernel before,
    # they have the time to ask for their keys.
    is_small = parts * heads.g * b * tiles <= at_once
    chunk = max(PLAN.chunk * (2 // slots), padded_n, tile_blocks)
    decode_split_kernel[(parts * heads.g * b * tiles,)](
        q, (cos, sin), (tensors.k_cmp, tensors.v_cmp, k_win, v_win), (tensors.block_table, window_table),
        tensors.lengths, tensors.arrivals, (work.part_acc, work.part_top, work.part_total), work.sums, work.tops,
        work.scores, work.picks, work.bits, t, heads.g, b * tiles, pages, window_pages, config.window_size, runs,
        int(is_small), num_blocks, num_tops, scale * LOG2E,
        strides_of(q), tuple(x.stride(i) for x in (tensors.k_cmp, tensors.v_cmp, k_win, v_win) for i in (0, 2)),
        *(x.stride(1) for x in (tensors.k_cmp, tensors.v_cmp, k_win, v_win)), GP=group,
        REACH=config.compress_block_size // stride, PER_BLOCK=per_block,
        PER_BLOCK_PADDED=per_block_padded, INITIAL=config.num_initial_blocks, LOCAL=config.num_local_blocks,
        PAGE_STRIDES=0 if pages == 1 else page_size // stride, RING=k_win.shape[1] if is_ring else 0,
        WINDOW_TOKENS=0 if window_pages == 1 else k_win.shape[1], TILES=tiles, WINDOW_TILES=PLAN.window_tiles,
        CHUNK=chunk, BLOCKS=max(PLAN.select_blocks, chunk), BLOCK_N=keys, STAGES=stages, num_warps=PLAN.warps,
        **common, **launch_pdl, **registers,
    )  # fmt: skip
    per_share, merges = cdiv(n, PLAN.shares), min(PLAN.merges, heads.padded_e)
    finish_n = tile_keys(heads, q, PLAN.finish_n)
    is_crowded = PLAN.shares * heads.g * b * t * head_tiles > at_once > 0
    together, stages = (PLAN.together, PLAN.together_stages) if is_crowded else (1, PLAN.finish_stages)
    decode_finish_kernel[((PLAN.shares // together + merges) * heads.g * b * t * head_tiles,)](
        q, (cos, sin), (tensors.k, tensors.v), gates, out, tensors.block_table, tensors.lengths, counts,
        tensors.arrivals, (work.part_acc, work.part_top, work.part_total), work.others,
        (work.slc_acc, work.slc_top, work.slc_total), work.picks,
        t, heads.g, b * t * head_tiles, pages, config.window_size, runs, scale * LOG2E,
        strides_of(q), strides_of(gates), tuple(x.stride(i) for x in (tensors.k, tensors.v) for i in (0, 2)),
        tensors.k.stride(1), tensors.v.stride(1),
        ROWS=TILE_ROWS, HAS_COUNTS=counts is not None, TILE_STRIDES=tile_strides,
        WINDOW_SPLITS_PADDED=next_power_of_2(window_splits), WINDOW_KEYS=window_keys, SHARES=PLAN.shares,
        PER_SHARE=per_share, TOGETHER=together, SELECT_PADDED=max(16, next_power_of_2(select)),
        PICKS=next_power_of_2(per_share * together),
        MERGES=merges, BLOCK_N=finish_n, STAGES=tile_stages(heads, q, finish_n, stages),
        num_warps=PLAN.finish_warps, **common, **launch_pdl,
        **registers,
    )  # fmt: skip
    return out, work.picks[: b * t * heads.g * padded_n].view(b, t, heads.g, padded_n)


KINDS = {"mean": 0, "linear": 1, "mlp": 2}


@torch.library.custom_op(
    "nsa::append_tokens",
    mutates_args=(
        "to_k", "to_v", "to_k_cmp", "to_v_cmp", "to_k_win", "to_v_win", "to_k_raw", "to_v_raw", "lengths", "arrivals",
    ),
)  # fmt: skip
def _append_tokens(
    to_k: Tensor, to_v: Tensor, to_k_cmp: Tensor, to_v_cmp: Tensor, to_k_win: Tensor | None, to_v_win: Tensor | None,
    to_k_raw: Tensor, to_v_raw: Tensor, block_table: Tensor, window_table: Tensor | None, raw_table: Tensor | None,
    lengths: Tensor, arrivals: Tensor, k: Tensor, v: Tensor,
    k_win: Tensor | None, v_win: Tensor | None, k_raw: Tensor, v_raw: Tensor, phi_k: list[Tensor], phi_v: list[Tensor],
    cos_cmp: Tensor, sin_cmp: Tensor, counts: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    sizes: list[int], kind: str,
) -> None:  # fmt: skip
    from nsa.kernels.library import _config, _serving

    memory = (to_k, to_v, to_k_cmp, to_v_cmp, to_k_win, to_v_win, to_k_raw, to_v_raw)
    tensors = CacheTensors(*memory, block_table, lengths, arrivals, window_table, raw_table)
    new, step = [k, v, k_win, v_win, k_raw, v_raw], DecodeStep(counts, cos, sin, cos_cmp, sin_cmp)
    with _serving(k, v, to_k, to_v, k_raw, v_raw, scale=1.0):
        append(tensors, new, _config(sizes), kind, (phi_k, phi_v), step)


@_append_tokens.register_fake
def _(*_):
    return None


def append_tokens(
    tensors: CacheTensors, new: Branches, config: NSAConfig, phi: tuple[Sequence[Tensor], Sequence[Tensor]],
    step: DecodeStep,
) -> None:  # fmt: skip
    """See `nsa.ops.decode.append_tokens`. Tokens without room are not written.

    Raises:
        ValueError: shapes that do not fit, or tensors that the kernels do not take.
    """
    from nsa.kernels.library import _serving, sizes_of

    tensors.check_tokens(config, new, step)
    k_raw, v_raw, k, v, k_win, v_win = new.tensors
    if k.shape[1] > tensors.arrivals.shape[2]:
        raise ValueError(f"append_tokens: expected at most {tensors.arrivals.shape[2]} tokens, got {k.shape[1]}")
    if not torch.compiler.is_compiling():
        with _serving(k, v, tensors.k, tensors.v, k_raw, v_raw, scale=1.0):
            append(tensors, [k, v, k_win, v_win, k_raw, v_raw], config, config.compression, phi, step)
        return
    phi_k, phi_v = map(list, phi)
    _append_tokens(
        tensors.k, tensors.v, tensors.k_cmp, tensors.v_cmp, tensors.k_win, tensors.v_win, tensors.k_raw, tensors.v_raw,
        tensors.block_table, tensors.window_table, tensors.raw_table, tensors.lengths, tensors.arrivals,
        k, v, k_win, v_win, k_raw, v_raw, phi_k, phi_v, step.cos_cmp, step.sin_cmp, step.counts, step.cos, step.sin,
        sizes_of(config), config.compression,
    )  # fmt: skip


def append(
    tensors: CacheTensors, new: Sequence[Tensor | None], config: NSAConfig, kind: str,
    phi: tuple[Sequence[Tensor], Sequence[Tensor]], step: DecodeStep,
) -> None:  # fmt: skip
    """`new`: k, v, k_win, v_win, k_raw, v_raw; the window's are not read where the cache has none of its own."""
    k, v = new[0], new[1]
    assert k is not None
    assert v is not None
    b, t, g, d = k.shape
    e = v.shape[3]
    if b * t == 0:
        return
    has_window = tensors.k_win is not None
    new = new if has_window else [k, v, k, v, *new[4:]]
    new = [launch.as_rows(x) for x in new if x is not None]
    memory = [tensors.k, tensors.v, tensors.k_win, tensors.v_win, tensors.k_raw, tensors.v_raw]
    if not has_window:
        memory[2:4] = memory[:2]
    memory += [tensors.k_cmp, tensors.v_cmp]
    factors = (step.cos, step.sin, step.cos_cmp, step.sin_cmp)
    cos, sin, cos_cmp, sin_cmp = (None if x is None else x.contiguous() for x in factors)
    counts = step.counts
    # Position encoding, first layer, its bias, last layer, its bias; None what this kind of phi has not.
    layers = [[x.contiguous() for x in weights] for weights in phi]
    if kind == "mlp":
        layers_k, layers_v = layers
    elif kind == "linear":
        layers_k, layers_v = ([None, weight, None, None, None] for (weight,) in layers)
    else:
        layers_k = layers_v = [None] * 5
    units = [0 if x[1] is None else x[1].shape[0] for x in (layers_k, layers_v)]
    # The first layer's units, and the mean, which the linear kind has not.
    has_mean = kind != "linear"
    parts = [cdiv(x, UNITS) + has_mean for x in units]
    num_new = cdiv(t, config.compress_stride)
    flat = b * num_new * g
    hidden = [
        torch.empty(flat * (x + width * has_mean), dtype=torch.float32, device=k.device)
        for x, width in zip(units, (d, e), strict=True)
    ]
    pages, page_size = tensors.block_table.shape[1], tensors.k.shape[1]
    raw_table = tensors.block_table if tensors.raw_table is None else tensors.raw_table
    window_table = raw_table if tensors.window_table is None else tensors.window_table
    pdl = PLAN.pdl and launch.is_hopper(k.device)
    padded_d, padded_e = (max(16, next_power_of_2(x)) for x in (d, e))
    # Numbers of a token that a warp multiplies at once, and units of the last layer; short sums in fp32.
    is_fp32 = k.dtype == torch.float32
    slices = [min(32 if is_fp32 else 64, x) for x in (padded_d, padded_e)]
    inner = 16 if is_fp32 else min(64, 8192 // max(padded_d, padded_e))
    decode_append_kernel[(b * t + cdiv(flat, ROWS) * sum(parts),)](
        tuple(new), (cos, sin), tuple(memory), tuple(layers_k), tuple(layers_v), (cos_cmp, sin_cmp), tuple(hidden),
        (tensors.block_table, window_table, raw_table), tensors.lengths, counts, tensors.arrivals,
        b, t, g, num_new, pages, window_table.shape[1], raw_table.shape[1], pages * page_size,
        tuple(units), tuple(parts), strides_of(*new), strides_of(*memory),
        GROUPS=next_power_of_2(g), D=d, DP=padded_d, E=e, EP=padded_e, BLOCK=config.compress_block_size,
        STRIDE=config.compress_stride, PAGE_TOKENS=0 if pages == 1 else page_size,
        PAGE_STRIDES=0 if pages == 1 else page_size // config.compress_stride, RING=memory[2].shape[1],
        RAW_RING=tensors.k_raw.shape[1], PAGED=tensors.raw_table is not None, HAS_WINDOW=has_window,
        ROTATE=cos is not None, HAS_COUNTS=counts is not None, KIND=KINDS[kind], UNITS=UNITS, ROWS=ROWS, WARPS=4,
        SLICE_D=slices[0], SLICE_E=slices[1], INNER=inner, STAGES=4, PRECISION="ieee" if is_fp32 else "tf32", PDL=pdl,
        num_warps=4,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
