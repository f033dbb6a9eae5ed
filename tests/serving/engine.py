"""What an engine does with blocks, in little: tables from one pool, blocks taken back, prefixes shared.

Every address is written out once more, a row at a time, from the text of nsa.serving.blocks.
"""

from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from nsa.config import NSAConfig
from nsa.modules.rotary import RotaryEmbedding
from nsa.ops.compress import phi_linear, phi_mean, phi_mlp
from nsa.serving.append import append
from nsa.serving.attend import attend
from nsa.serving.blocks import LayerBlocks
from nsa.serving.step import Step
from nsa.testing import brute_force

CONFIG = NSAConfig(compress_block_size=8, compress_stride=4, select_block_size=8, num_selected_blocks=4, window_size=10)
PHI = {"mean": phi_mean, "linear": phi_linear, "mlp": phi_mlp}
H, G, D, E = 4, 2, 8, 16


class Text:
    """All tokens of one request, as a layer sees them, and what attention of them is."""

    def __init__(self, length: int, config: NSAConfig = CONFIG, seed: int = 0, prefix: "Text | None" = None) -> None:
        self.config, self.length = config, length
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.q, self.gates = normal(length, H, D), normal(length, H, 3).sigmoid()
        self.keys = {name: normal(length, G, D) for name in ("k", "k_win", "k_raw")}
        self.values = {name: normal(length, G, E) for name in ("v", "v_win", "v_raw")}
        if config.shared_kv:
            self.keys = dict.fromkeys(self.keys, self.keys["k"])
            self.values = dict.fromkeys(self.values, self.values["v"])
        if prefix is not None:
            for mine, its in ((self.keys, prefix.keys), (self.values, prefix.values)):
                for name in mine:
                    mine[name] = torch.cat([its[name], mine[name][prefix.length :]])
            self.q, self.gates = (torch.cat([a, b[prefix.length :]]) for a, b in zip(
                (prefix.q, prefix.gates), (self.q, self.gates), strict=True
            ))  # fmt: skip
        weights = torch.Generator().manual_seed(99)  # of the layer, not of the text
        self.phi = [partial(PHI[config.compression], **_weights(config, width, weights)) for width in (D, E)]

    def rotated(self, x: Tensor, first: int = 0, stride: int = 1) -> Tensor:
        cos, sin = rotary(torch.arange(first, first + stride * len(x), stride))
        half = D // 2
        turn = torch.complex(cos[:, :half], sin[:, :half]).unsqueeze(1)
        z = torch.complex(x[..., :half], x[..., half:]) * turn
        return torch.cat([z.real, z.imag], -1)

    def truth(self) -> Tensor:
        config = self.config
        k_cmp = brute_force.compress(self.keys["k_raw"], config, self.phi[0])
        k_cmp = self.rotated(k_cmp, stride=config.compress_stride) if len(k_cmp) else k_cmp
        return brute_force.native_sparse_attention(
            self.rotated(self.q), self.rotated(self.keys["k"]), self.values["v"], self.gates, config,
            k_cmp=k_cmp, v_cmp=brute_force.compress(self.values["v_raw"], config, self.phi[1]),
            k_win=self.rotated(self.keys["k_win"]), v_win=self.values["v_win"],
        )  # fmt: skip


def rotary(positions: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = RotaryEmbedding(D)(torch.zeros(0, dtype=torch.float64), positions[None])
    return cos[0], sin[0]


def _weights(config: NSAConfig, width: int, generator: torch.Generator) -> dict[str, Tensor]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) / 4

    flat = config.compress_block_size * width
    if config.compression == "linear":
        return {"weight": normal(width, flat)}
    if config.compression == "mean":
        return {}
    return {
        "position_encoding": normal(config.compress_block_size, width), "weight_in": normal(2 * width, flat),
        "bias_in": normal(2 * width), "weight_out": normal(width, 2 * width), "bias_out": normal(width),
    }  # fmt: skip


@dataclass
class Row:
    """A request that runs: how many of its tokens are computed, its tables, its outputs so far."""

    text: Text
    computed: int = 0
    tables: dict[str, list[int]] = field(default_factory=lambda: {"main": [], "win": [], "raw": []})
    out: list[Tensor] = field(default_factory=list)


class Engine:
    """Blocks of `size` tokens of one layer, NaN wherever nothing was written; block 0 is nobody's."""

    def __init__(
        self, config: NSAConfig = CONFIG, size: int = 16, num_blocks: int = 64, dtype: torch.dtype = torch.float64,
        device: str = "cpu",
    ) -> None:  # fmt: skip
        self.config, self.size, self.dtype, self.device = config, size, dtype, device
        order = torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(5)) + 1
        self.free = order.tolist()
        self.uses = [0] * num_blocks

        def pair(places: int) -> tuple[Tensor, Tensor]:  # heads before tokens in memory, keys beside values
            both = torch.full((num_blocks, G, places, D + E), torch.nan, dtype=dtype, device=device).transpose(1, 2)
            return both[..., :D], both[..., D:]

        window = (None, None) if config.shared_kv else pair(size)
        self.memory = LayerBlocks(*pair(size), *pair(size // config.compress_stride), *window, *pair(size))

    @property
    def reach(self) -> dict[str, int]:
        """Tokens before the next one that each table keeps."""
        return {"main": 1 << 30, "win": self.config.window_size - 1, "raw": self.config.compress_block_size - 1}

    def take(self) -> int:
        block = self.free.pop()
        self.uses[block] = 1
        return block

    def give_back(self, block: int) -> None:
        self.uses[block] -= 1
        if block and not self.uses[block]:
            self.free.append(block)

    def drop(self, row: Row) -> None:
        """Preempt: the row's blocks go, and its outputs are computed again."""
        for table in row.tables.values():
            for block in table:
                if block:
                    self.give_back(block)
            table.clear()
        row.computed, row.out = 0, []

    def share(self, row: Row, of: Row) -> None:
        """A prefix hit: `row` begins with the whole blocks of `of` that both texts begin with, and what it reaches."""
        blocks = min(row.text.length - 1, of.computed) // self.size
        row.computed = blocks * self.size
        row.out = list(of.out[: row.computed])
        for name, table in row.tables.items():
            lost = max(0, row.computed - self.reach[name]) // self.size
            assert all(of.tables[name][lost:blocks]), "a block that a hit needs was taken back"
            table[:] = [0] * lost + of.tables[name][lost:blocks]
            for block in table[lost:]:
                self.uses[block] += 1

    def make_room(self, work: list[tuple[Row, int]]) -> None:
        """Blocks for the next n tokens of each row; those that are out of reach go back."""
        for row, new in work:
            for name, table in row.tables.items():
                for lost in range(max(0, row.computed - self.reach[name]) // self.size):
                    if table[lost]:
                        self.give_back(table[lost])
                        table[lost] = 0
                while len(table) * self.size < row.computed + new:
                    table.append(self.take())

    def step(self, work: list[tuple[Row, int]], padding: int = 0) -> None:
        """Compute the next n tokens of each row, n may be 0; `padding` rows of no token, and packed tokens, behind."""
        self.make_room(work)
        starts, packed = [0], {name: [] for name in ("q", "gates", "k", "v", "k_win", "v_win", "k_raw", "v_raw")}
        for row, new in work:
            text, run = row.text, slice(row.computed, row.computed + new)
            for name, x in {**text.keys, **text.values, "q": text.q, "gates": text.gates}.items():
                rotates = name in ("q", "k", "k_win") and new
                packed[name].append(text.rotated(x[run], first=row.computed) if rotates else x[run])
            row.computed += new
            starts.append(starts[-1] + new)
        for xs in packed.values():
            xs.append(xs[0].new_full((padding, *xs[0].shape[1:]), torch.nan))
        given = {name: torch.cat(xs).to(self.device, self.dtype) for name, xs in packed.items()}
        step = Step(
            self.config, self.size, starts + [starts[-1]] * padding, [row.computed for row, _ in work] + [0] * padding,
            self._table(work, "main", padding), None if self.config.shared_kv else self._table(work, "win", padding),
            self._table(work, "raw", padding),
        )  # fmt: skip
        null = [x[0].clone() for x in vars(self.memory).values() if x is not None]
        q, gates = given.pop("q"), given.pop("gates")
        cos, sin = (x.to(self.device, self.dtype) for x in rotary(step.block_positions.cpu()))
        phi_k, phi_v = (moved(phi, self.device, self.dtype) for phi in work[0][0].text.phi)
        append(self.memory, step, tuple(given.values()), (phi_k, phi_v), cos, sin)
        out = attend(q, gates, self.memory, step)
        after = [x[0] for x in vars(self.memory).values() if x is not None]
        assert all(torch.equal(a.isnan(), b.isnan()) for a, b in zip(null, after, strict=True)), "wrote block 0"
        assert not out[starts[-1] :].any(), "padding is 0"
        for (row, _), start, stop in zip(work, starts, starts[1:], strict=False):
            row.out += out[start:stop].cpu().unbind()

    def _table(self, work: list[tuple[Row, int]], name: str, padding: int) -> Tensor:
        """As wide as the widest, and a column more; 0 where a row has no block."""
        widest = max(len(row.tables[name]) for row, _ in work) + 1
        rows = [row.tables[name] + [0] * (widest - len(row.tables[name])) for row, _ in work]
        return torch.tensor(rows + [[0] * widest] * padding, dtype=torch.int32, device=self.device)


def moved(phi: partial, device: str, dtype: torch.dtype) -> partial:
    return partial(phi.func, **{name: x.to(device, dtype) for name, x in phi.keywords.items()})


def finished(row: Row) -> None:
    """The row's outputs are those of its whole text."""
    torch.testing.assert_close(torch.stack(row.out), row.text.truth()[: row.computed], rtol=1e-10, atol=1e-10)


def variants() -> list[NSAConfig]:
    return [
        CONFIG,
        replace(CONFIG, compression="linear", shared_kv=True),
        replace(CONFIG, compression="mean", compress_block_size=4, window_size=1),
        replace(CONFIG, select_block_size=16, num_selected_blocks=3, num_local_blocks=1, window_size=40),
    ]
