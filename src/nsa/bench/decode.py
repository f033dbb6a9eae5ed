"""`nsa bench decode`: one layer's attention for one new token a row, as a CUDA graph, beside dense attention."""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nsa.bench.arguments import DecodeArguments
from nsa.bench.result import Entry
from nsa.bench.timing import interleaved
from nsa.cache_tensors import CacheTensors, Pages, empty_cache_tensors
from nsa.config import NSAConfig
from nsa.decode_step import DecodeStep
from nsa.decoding import append_tokens, decode_attention
from nsa.serving.blocks import LayerBlocks
from nsa.serving.decode import DecodeTables, decode
from nsa.streams import Branches, Stream

RIVALS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "FlashAttention-2": SDPBackend.FLASH_ATTENTION}
STEPS = 16  # captured in a graph, at least
MAX_CACHES = 48
# Bytes that the steps of a graph read before they read the same again: several times an L2.
COLD_BYTES = 250 << 20
PAGE = 256
ROOM = 512

Runs = dict[str, list[Callable[[], object]]]


def measure(arguments: DecodeArguments, device: str = "cuda") -> Iterator[Entry]:
    """For every length and batch: attention with keys from memory; with the append; all keys in L2 where they fit."""
    bandwidth = _copy_rate(device)
    for length in arguments.lengths:
        for batch in arguments.batches:
            yield from _cell(arguments, length, batch, bandwidth, device)
            torch.cuda.empty_cache()


def read_bytes(keys: int, g: int, d: int, e: int) -> int:
    """Bytes of so many 16-bit keys and values of each KV head."""
    return 2 * keys * g * (d + e)


def _cell(arguments: DecodeArguments, length: int, batch: int, bandwidth: float, device: str) -> Iterator[Entry]:
    config, g, d, e = NSAConfig(), arguments.kv_heads, arguments.head_dim, arguments.e
    sparse, dense = (batch * read_bytes(keys, g, d, e) for keys in (config.keys_per_query(length), length))
    # Floors in microseconds.
    facts = {"batch": float(batch), "floor": sparse / bandwidth * 1e6, "dense floor": dense / bandwidth * 1e6}
    cache = dense * (1 + 1 / config.compress_stride) * (1 + ROOM / length)
    free = torch.cuda.mem_get_info()[0] * 0.9
    if cache > free:
        yield Entry(
            length=length, inputs=f"batch {batch}", part="attention", ms={}, facts=facts | {"needs GiB": cache / 2**30}
        )
        return
    number = max(1, min(MAX_CACHES, math.ceil(COLD_BYTES / sparse), int(free / cache)))
    layers = [_Layer(arguments, config, length - i % config.compress_stride, batch, device) for i in range(number)]
    steps = max(number, STEPS if sparse < 1 << 30 else STEPS // 4)

    def entry(part: str, runs: Runs) -> Entry:
        graphs, ms = {}, {}
        for name, run in runs.items():
            try:
                graphs[name] = _captured([run[i % len(run)] for i in range(steps)])
            except RuntimeError as error:  # a rival without a kernel for this shape: the others go on
                reason = str(error).splitlines()[0]
                print(f"nsa bench: {name} at {length:,} tokens, batch {batch}: {reason}", file=sys.stderr)
        ms = interleaved({name: graph.replay for name, graph in graphs.items()}, arguments.repetitions)
        return Entry(
            length=length, inputs=f"batch {batch}", part=part, facts=facts,
            ms={name: time / steps for name, time in ms.items()},
        )  # fmt: skip

    runs: Runs = {"NSA": [layer.attend for layer in layers]}
    if 2 * number * cache < free:
        paged = [_Layer(arguments, config, length, batch, device, page=PAGE) for _ in range(number)]
        runs["NSA, pages"] = [layer.attend for layer in paged]
    rivals: Runs = {name: [layer.dense(RIVALS[name]) for layer in layers] for name in arguments.rivals}
    yield entry("attention", runs | rivals)
    runs.pop("NSA, pages", None)
    if sparse < torch.cuda.get_device_properties(device).L2_cache_size // 2:
        first: Runs = {name: run[:1] for name, run in (runs | rivals).items()}
        yield entry("attention, one cache again and again", first)
    served: Runs = {}
    if 4 * number * cache < free:
        paged = [_Served(arguments, config, length - i % config.compress_stride, batch, device) for i in range(number)]
        served["NSA, block tables"] = [layer.step for layer in paged]
    static: Runs = {"NSA": [layer.step for layer in layers]}
    both = entry("append and attention", static | served)
    if served:
        both.facts["block tables / static"] = both.ms["NSA, block tables"] / both.ms["NSA"]
        print(
            f"nsa bench: at {length:,} tokens, batch {batch}, a step over an engine's block tables takes "
            f"{both.facts['block tables / static']:.2f} times the static cache's", file=sys.stderr,
        )  # fmt: skip
    yield both


class _Layer:
    """A cache of random keys and values, and one query a row."""

    def __init__(
        self, arguments: DecodeArguments, config: NSAConfig, length: int, batch: int, device: str,
        page: int | None = None,
    ) -> None:  # fmt: skip
        self.config, self.length = config, length
        h, g, d, e = arguments.heads, arguments.kv_heads, arguments.head_dim, arguments.e
        dtype = getattr(torch, arguments.dtype)
        size = page or -(-(length + ROOM) // config.select_block_size) * config.select_block_size
        per_row = -(-(length + ROOM) // size)
        pages = Pages(num_pages=batch * per_row, page_size=size, pages_per_row=per_row)
        self.tensors = empty_cache_tensors(
            config, pages, rows=batch, num_kv_heads=g, head_dim=d, v_head_dim=e, max_new=1, max_crop=64, dtype=dtype,
            device=device,
        )  # fmt: skip
        for x in _memory(self.tensors):
            x.transpose(1, 2).normal_()
        order = torch.randperm(batch * per_row, device=device) if page else torch.arange(batch * per_row, device=device)
        self.tensors.block_table.copy_(order.view(batch, per_row))
        self.tensors.lengths.fill_(length)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, dtype=dtype)

        self.q, self.gates = normal(batch, 1, h, d), normal(batch, 1, h, 3).sigmoid()
        cmp, slc, win = (Stream(normal(batch, 1, g, d), normal(batch, 1, g, e)) for _ in range(3))
        self.new = Branches(cmp, slc, win)

        def phi(width: int) -> tuple[Tensor, ...]:
            block, wide = config.compress_block_size, config.compress_block_size * width
            shapes = ((block, width), (2 * width, wide), (2 * width,), (width, 2 * width), (width,))
            return tuple(normal(*shape) * wide**-0.5 for shape in shapes)

        self.phi = phi(d), phi(e)
        cos, sin = normal(batch, 1, d), normal(batch, 1, d)
        self.factors = DecodeStep(None, cos, sin, cos, sin)

    def attend(self) -> Tensor:
        return decode_attention(self.q, self.gates, self.tensors, self.config, backend="triton")

    def step(self) -> Tensor:
        """Append and attention, keys and query rotated inside."""
        append_tokens(self.tensors, self.new, self.config, self.phi, self.factors, backend="triton")
        cos, sin = self.factors.cos, self.factors.sin
        return decode_attention(self.q, self.gates, self.tensors, self.config, cos=cos, sin=sin, backend="triton")

    def dense(self, backend: SDPBackend) -> Callable[[], Tensor]:
        """Dense attention of the same query over the same raw keys.

        `enable_gqa`, so that a key is read once for its group. The other way to share it, the group's heads as 16
        queries of one head, took as long on an H200 (FlashAttention-2; cuDNN at batch 32) or, by cuDNN at batch 1,
        7 to 18 times as long, since it then does not split the keys.
        """
        q = self.q.transpose(1, 2)
        k, v = (x.transpose(1, 2)[:, :, : self.length] for x in (self.tensors.k, self.tensors.v))

        def run() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

        return run


class _Served(_Layer):
    """The same as a serving engine has it: window and raw tokens in blocks too, keys beside values in memory."""

    def __init__(self, arguments: DecodeArguments, config: NSAConfig, length: int, batch: int, device: str) -> None:
        super().__init__(arguments, config, length, batch, device, page=PAGE)
        g, d, e, dtype = arguments.kv_heads, arguments.head_dim, arguments.e, self.q.dtype
        per_row = self.tensors.block_table.shape[1]

        def pair(blocks: int, tokens: int) -> tuple[Tensor, Tensor]:
            both = torch.randn(blocks, g, tokens, d + e, device=device, dtype=dtype).transpose(1, 2)
            return both[..., :d], both[..., d:]

        def near(kept: int) -> tuple[Tensor, int]:
            """Blocks for the last `kept` tokens and those to come; -1 for those before, which an engine took back."""
            first = max(0, length - kept) // PAGE
            table = torch.full((batch, per_row), -1, dtype=torch.int32, device=device)
            count = batch * (per_row - first)
            table[:, first:] = torch.randperm(count, device=device).view(batch, -1)
            return table, count

        (window, of_window), (raw, of_raw) = near(config.window_size), near(config.compress_block_size)
        self.memory = LayerBlocks(
            *pair(batch * per_row, PAGE), *pair(batch * per_row, PAGE // config.compress_stride),
            *pair(of_window, PAGE), *pair(of_raw, PAGE),
        )  # fmt: skip
        self.tensors = replace(self.tensors, **vars(self.memory))
        lengths, counts = self.tensors.lengths, torch.ones_like(self.tensors.lengths)
        self.tables = DecodeTables(1, self.tensors.block_table, window, raw, lengths + 1, counts, self.tensors.arrivals)
        self.factors = replace(self.factors, counts=counts)
        cmp, slc, win = self.new
        self.pairs = [x[:, 0] for x in (slc.k, slc.v, win.k, win.v, cmp.k, cmp.v)]

    def step(self) -> Tensor:
        return decode(
            self.memory, self.tables, self.factors, self.tensors.lengths, self.q[:, 0], self.gates[:, 0], self.pairs,
            self.phi, self.config,
        )  # fmt: skip


def _memory(tensors: CacheTensors) -> Sequence[Tensor]:
    found = (
        tensors.k, tensors.v, tensors.k_cmp, tensors.v_cmp, tensors.k_win, tensors.v_win, tensors.k_raw, tensors.v_raw
    )  # fmt: skip
    return [x for x in found if x is not None]


def _captured(steps: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        steps[0]()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    return graph


def _copy_rate(device: str) -> float:
    """Bytes a second of a large copy, read and written."""
    x = torch.empty(1 << 30, dtype=torch.int8, device=device)
    y = torch.empty_like(x)
    return 2 * x.numel() / (interleaved({"copy": lambda: y.copy_(x)}, 5)["copy"] / 1e3)
