"""Decoding steps of an engine in storage that stays where it is, as a CUDA graph needs: filled, then run again."""

from functools import partial

import torch
from serving.engine import D, E, Engine, G, H, Row, moved
from torch import Tensor

from nsa.modules.rotary import RotaryEmbedding
from nsa.serving.decode import DecodeTables, decode

NAMES = ("k", "v", "k_win", "v_win", "k_raw", "v_raw")


class Fixed:
    """Room for `rows` rows of t columns, and tables of `width` blocks; rows that are not given are padding."""

    def __init__(self, engine: Engine, rows: int, t: int, width: int, phi: list[partial], spare: int = 0) -> None:
        self.engine, self.rows, self.t, self.width = engine, rows, t, width
        device, dtype, tokens = engine.device, engine.dtype, rows * t + spare

        def table() -> Tensor:
            return torch.full((rows, width), -1, dtype=torch.int32, device=device)

        def count() -> Tensor:
            return torch.zeros(rows, dtype=torch.int32, device=device)

        shared = engine.config.shared_kv
        self.tables = DecodeTables(
            t, table(), None if shared else table(), table(), count(), count(),
            torch.zeros(rows, G, 16, dtype=torch.int32, device=device),
        )  # fmt: skip
        self.q = torch.zeros(tokens, H, D, dtype=dtype, device=device)
        self.gates = torch.zeros(tokens, H, 3, dtype=dtype, device=device)
        names = NAMES[:2] if shared else NAMES
        self.new = {name: torch.zeros(tokens, G, E if name[0] == "v" else D, dtype=dtype, device=device)
                    for name in names}  # fmt: skip
        self.phi = tuple(tuple(moved(x, device, dtype).keywords.values()) for x in phi)
        self.rotary = RotaryEmbedding(D).to(device)
        self.out = torch.zeros(tokens, H, E, dtype=dtype, device=device)

    def run(self) -> None:
        """What a graph of the step holds."""
        step, (before,) = self.tables.step(1, self.engine.config, self.rotary, self.q)
        self.out.copy_(decode(
            self.engine.memory, self.tables, step, before, self.q, self.gates, list(self.new.values()), self.phi,
            self.engine.config,
        ))  # fmt: skip

    def fill(self, rows: list[Row]) -> None:
        """The next t tokens of these rows; NaN where there are none."""
        self.engine.make_room([(row, self.t) for row in rows])
        tables = {"main": self.tables.table, "win": self.tables.table_win, "raw": self.tables.table_raw}
        for name, table in tables.items():
            if table is not None:
                found = [row.tables[name] + [0] * (self.width - len(row.tables[name])) for row in rows]
                found = torch.tensor(found + [[0] * self.width] * (self.rows - len(rows)), dtype=torch.int32)
                table.copy_(torch.where(found > 0, found, -1))
        for x in (self.q, self.gates, *self.new.values()):
            x.fill_(torch.nan)
        self.tables.lengths.zero_()
        self.tables.counts.zero_()
        for number, row in enumerate(rows):
            text, run = row.text, slice(row.computed, row.computed + self.t)
            at = slice(number * self.t, (number + 1) * self.t)
            given = {**text.keys, **text.values}
            self.q[at], self.gates[at] = text.q[run], text.gates[run]
            for name, x in self.new.items():
                x[at] = given[name][run]
            row.computed += self.t
            self.tables.lengths[number], self.tables.counts[number] = row.computed, self.t

    def take(self, rows: list[Row]) -> None:
        """The step's outputs; what is padding is 0."""
        found = self.out[: self.rows * self.t].unflatten(0, (self.rows, self.t)).to("cpu", copy=True)
        for row, x in zip(rows, found, strict=False):
            row.out += x.unbind()
        assert not self.out[len(rows) * self.t :].any(), "padding is 0"

    def step(self, rows: list[Row], run=None) -> None:
        """Fill, run (or replay), take; nothing is written to block 0, and counters are 0 again."""
        self.fill(rows)
        memory = [x for x in vars(self.engine.memory).values() if x is not None]
        before = [x[0].clone() for x in memory]
        (run or self.run)()
        after = [x[0] for x in memory]
        assert all(torch.equal(a.isnan(), b.isnan()) for a, b in zip(before, after, strict=True)), "wrote block 0"
        assert not self.tables.arrivals.any()
        self.take(rows)
