"""Caches with known contents, for the tests of decoding on the CPU, in the interpreter and on a GPU.

Every address is written out here once more, a row at a time, from the text of nsa.cache_tensors.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from nsa.cache_tensors import ALIGNMENT, CacheTensors, Pages, empty_cache_tensors
from nsa.config import NSAConfig
from nsa.decode_step import DecodeStep
from nsa.modules.rotary import RotaryEmbedding
from nsa.ops.compress import compress, phi_linear, phi_mean, phi_mlp
from nsa.streams import Branches
from nsa.testing import INPUT_FAMILIES, InputShape


@dataclass(frozen=True, kw_only=True)
class DecodeCase:
    """Rows of `lengths` tokens, the last t of which are queries too."""

    lengths: tuple[int, ...]
    t: int = 1
    config: NSAConfig
    dtype: torch.dtype = torch.float32
    h: int = 4
    g: int = 2
    d: int = 8
    e: int = 16
    family: str = "random"
    page_size: int | None = None  # None: one page a row
    room: int = 0  # tokens that a row may hold beyond the longest
    max_crop: int = 3

    def __str__(self) -> str:
        c = self.config
        sizes = f"{c.compress_block_size}/{c.compress_stride}/{c.select_block_size}/{c.num_selected_blocks}"
        lengths = ",".join(map(str, self.lengths))
        dtype = str(self.dtype).removeprefix("torch.")
        page = "static" if self.page_size is None else f"page{self.page_size}"
        shared = "-shared" if c.shared_kv else ""
        return (
            f"{lengths}t{self.t}-{dtype}-h{self.h}g{self.g}d{self.d}e{self.e}-{sizes}w{c.window_size}"
            f"{c.compression}{shared}-{page}-{self.family}"
        )


class Scene:
    """All tokens of a case, and caches that hold the first of them."""

    def __init__(self, case: DecodeCase, device: str = "cpu", seed: int = 0) -> None:
        self.case, self.device = case, device
        config, b, t = case.config, len(case.lengths), case.t
        self.longest = max(*case.lengths, t, 1)
        generator = torch.Generator().manual_seed(seed)
        shape = InputShape(b=b, t=t, s=self.longest, h=case.h, g=case.g, d=case.d, e=case.e)
        make = INPUT_FAMILIES[case.family]

        def move(x: Tensor) -> Tensor:
            return x.to(device, case.dtype)

        # Keys before rotation.
        self.q, self.k, self.v = map(move, make(generator, shape))
        if config.shared_kv:
            self.k_win, self.v_win, self.k_raw, self.v_raw = self.k, self.v, self.k, self.v
        else:
            _, self.k_win, self.v_win = map(move, make(generator, shape))
            _, self.k_raw, self.v_raw = map(move, make(generator, shape))
        self.gates = move(torch.rand(b, t, case.h, 3, generator=generator))
        self.phi_k, self.phi_v = (
            tuple(move(x) for x in phi_weights(config, width, generator)) for width in (case.d, case.e)
        )

    @property
    def scale(self) -> float:
        return self.case.d**-0.5

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return RotaryEmbedding(self.case.d)(self.q, positions.to(self.device))

    @cached_property
    def k_cmp(self) -> Tensor:
        keys = self._compress(self.k_raw, self.phi_k)
        blocks = torch.arange(keys.shape[1])[None].expand(len(keys), -1)
        return rotate(keys, *self.rotary(blocks * self.case.config.compress_stride))

    @cached_property
    def v_cmp(self) -> Tensor:
        return self._compress(self.v_raw, self.phi_v)

    def _compress(self, x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        config = self.case.config
        phi = {"mean": phi_mean, "linear": phi_linear, "mlp": phi_mlp}[config.compression]
        return compress(x.double(), lambda y: phi(y, *(w.double() for w in weights)), config).to(x.dtype)

    def rotated(self, x: Tensor) -> Tensor:
        return rotate(x, *self.rotary(torch.arange(x.shape[1])[None].expand(len(x), -1)))

    def query_positions(self) -> Tensor:
        t = self.case.t
        return (torch.tensor(self.case.lengths)[:, None] - t + torch.arange(t)).to(self.device)

    # ---- caches ------------------------------------------------------------------------------------------

    def cache(self, lengths: tuple[int, ...]) -> CacheTensors:
        """A cache that holds the first lengths[r] tokens of row r, and has pages for all of case.lengths."""
        case, config = self.case, self.case.config
        size = case.page_size
        most = self.longest + case.room
        multiple = math.lcm(config.select_block_size, ALIGNMENT)
        static = size is None
        size = -(-most // multiple) * multiple if static else size
        per_row = -(-most // size)
        b = len(lengths)
        pages = Pages(num_pages=b if static else b * per_row + 2, page_size=size, pages_per_row=per_row)
        tensors = empty_cache_tensors(
            config, pages, rows=b, num_kv_heads=case.g, head_dim=case.d, v_head_dim=case.e,
            max_new=max(case.t, 1), max_crop=case.max_crop, dtype=case.dtype, device=self.device,
        )  # fmt: skip
        if static:
            tensors.block_table.copy_(torch.arange(b)[:, None])
        else:
            # Shuffled, and -1 where no token will come: the first and the last page belong to nobody.
            order = torch.randperm(b * per_row, generator=torch.Generator().manual_seed(1)).view(b, per_row) + 1
            needed = torch.tensor([-(-(length + case.room) // size) for length in case.lengths])
            tensors.block_table.copy_(order.where(torch.arange(per_row) < needed[:, None], -1))
        for x in (tensors.k, tensors.v, tensors.k_cmp, tensors.v_cmp, tensors.k_raw, tensors.v_raw):
            x.fill_(97.0)  # what is not written must not be read
        if tensors.k_win is not None:
            tensors.k_win.fill_(97.0)
            tensors.v_win.fill_(97.0)
        for row, length in enumerate(lengths):
            self._place(tensors, row, length)
        return tensors

    def _place(self, tensors: CacheTensors, row: int, length: int) -> None:
        config = self.case.config
        table, size = tensors.block_table[row].tolist(), tensors.page_size
        for memory, x in ((tensors.k, self.rotated(self.k)), (tensors.v, self.v)):
            for start in range(0, length, size):
                stop = min(start + size, length)
                memory[table[start // size], : stop - start] = x[row, start:stop]
        reach, step = config.compress_block_size // config.compress_stride - 1, config.compress_stride
        block = torch.arange(config.num_compressed_blocks(length))
        page, place = _divmod(block + reach, size // step)
        for memory, x in ((tensors.k_cmp, self.k_cmp), (tensors.v_cmp, self.v_cmp)):
            if len(block):
                memory[tensors.block_table[row].cpu()[page].long(), place] = x[row, : len(block)]
        rings = ((tensors.k_raw, self.k_raw), (tensors.v_raw, self.v_raw))
        if tensors.k_win is not None:
            rings += ((tensors.k_win, self.rotated(self.k_win)), (tensors.v_win, self.v_win))
        for ring, x in rings:
            position = torch.arange(max(0, length - ring.shape[1]), length)
            ring[row, position % ring.shape[1]] = x[row, position.to(x.device)]
        tensors.lengths[row] = length

    def new_tokens(self, before: tuple[int, ...], t: int, counts: tuple[int, ...], rotate_inside: bool) -> dict:
        """What `append_arguments` takes, for the last counts[r] of t columns; the columns before them are NaN."""
        config = self.case.config
        position = torch.tensor(before)[:, None] - t + torch.tensor(counts)[:, None] + torch.arange(t)
        there = (torch.arange(t) >= t - torch.tensor(counts)[:, None]).to(self.device)
        at = position.clamp(0, self.longest - 1).to(self.device)
        cos, sin = self.rotary(position.clamp(min=0))

        def pick(x: Tensor) -> Tensor:
            found = x.gather(1, at[:, :, None, None].expand(-1, -1, *x.shape[2:]))
            return found.masked_fill(~there[:, :, None, None], torch.nan)

        k, v, k_win, v_win, k_raw, v_raw = map(pick, (self.k, self.v, self.k_win, self.v_win, self.k_raw, self.v_raw))
        if not rotate_inside:
            k, k_win = (rotate(x, cos, sin) for x in (k, k_win))
        stride = config.compress_stride
        last = torch.tensor(before)[:, None] // stride + torch.arange(-(-t // stride))
        cos_cmp, sin_cmp = self.rotary(((last + 1) * stride - config.compress_block_size).clamp(min=0))
        given = {
            "k": k, "v": v, "k_win": k_win, "v_win": v_win, "k_raw": k_raw, "v_raw": v_raw, "config": config,
            "phi_k": self.phi_k, "phi_v": self.phi_v, "cos_cmp": cos_cmp, "sin_cmp": sin_cmp,
            "counts": torch.tensor(counts, dtype=torch.int32, device=self.device),
        }  # fmt: skip
        if config.shared_kv:
            given["k_win"] = given["v_win"] = None
        if rotate_inside:
            given |= {"cos": cos, "sin": sin}
        return given

    def to(self, dtype: torch.dtype) -> "Scene":
        """The same numbers in another dtype; compression and rotation are computed again."""
        scene = Scene.__new__(Scene)
        scene.case, scene.device, scene.longest = replace(self.case, dtype=dtype), self.device, self.longest
        for name in ("q", "k", "v", "k_win", "v_win", "k_raw", "v_raw", "gates"):
            setattr(scene, name, getattr(self, name).to(dtype))
        scene.phi_k, scene.phi_v = (tuple(w.to(dtype) for w in phi) for phi in (self.phi_k, self.phi_v))
        return scene


def append_arguments(given: dict) -> dict:
    """The arguments of append_tokens behind the tensors, of what `Scene.new_tokens` gives."""
    k, v = given["k"], given["v"]
    k_win, v_win = (own if own is not None else x for own, x in ((given["k_win"], k), (given["v_win"], v)))
    return {
        "new": Branches.of_tokens(given["k_raw"], given["v_raw"], k, v, k_win, v_win),
        "config": given["config"], "phi": (given["phi_k"], given["phi_v"]),
        "step": DecodeStep(given["counts"], given.get("cos"), given.get("sin"), given["cos_cmp"], given["sin_cmp"]),
    }  # fmt: skip


def _divmod(x: Tensor, by: int) -> tuple[Tensor, Tensor]:
    return x // by, x % by


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [b, s, g, d] by cos, sin [b, s, d], as complex numbers x[i] + i x[i + d/2]; in fp64, then rounded."""
    half = x.shape[-1] // 2
    z = torch.complex(x[..., :half].double(), x[..., half:].double())
    z = z * torch.complex(cos[..., :half].double(), sin[..., :half].double()).unsqueeze(2)
    return torch.cat([z.real, z.imag], -1).to(x.dtype)


def phi_weights(config: NSAConfig, width: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Of the size that a trained phi has: its outputs are of order one."""
    flat = config.compress_block_size * width

    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * std

    if config.compression == "mean":
        return ()
    if config.compression == "linear":
        return (normal(width, flat, std=flat**-0.5),)
    return (
        normal(config.compress_block_size, width, std=0.2),
        normal(2 * width, flat, std=flat**-0.5),
        normal(2 * width, std=0.2),
        normal(width, 2 * width, std=(2 * width) ** -0.5),
        normal(width, std=0.2),
    )


def window_in_pages(tensors: CacheTensors, size: int = 16) -> CacheTensors:
    """The same cache with its window in shuffled pages; what its rows do not hold is NaN, and has no page."""
    ring, rows = tensors.k_win.shape[1], tensors.rows
    per_row = -(-tensors.capacity // size)
    table = torch.randperm(rows * per_row, generator=torch.Generator().manual_seed(2)).view(rows, per_row)
    k, v = (x.new_full((rows * per_row, size, *x.shape[2:]), torch.nan) for x in (tensors.k_win, tensors.v_win))
    for row, length in enumerate(tensors.lengths.tolist()):
        for position in range(max(0, length - ring), length):
            for pages, x in ((k, tensors.k_win), (v, tensors.v_win)):
                pages[table[row, position // size], position % size] = x[row, position % ring]
        held = torch.arange(per_row) * size
        table[row] = table[row].where((held < length) & (held + size > length - ring), -1)
    return replace(tensors, k_win=k, v_win=v, window_table=table.int().to(tensors.k.device))


def same_memory(found: CacheTensors, expected: CacheTensors) -> None:
    """Every number of two caches, written or not."""
    for name, x in vars(expected).items():
        y = getattr(found, name)
        if x is None:
            assert y is None, name
        else:
            torch.testing.assert_close(y, x, msg=lambda text, name=name: f"{name}: {text}")
