"""A random life of a cache under one layer: what every token got is what it gets in a whole forward of its row."""

import copy
import math
import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from moved import moved
from torch import Tensor

from nsa import NativeSparseAttention, NSACache, NSAConfig
from nsa.cache import LayerCache, PagedNSACache, StaticNSACache, convert

WIDTH = 8


class SabotageError(Exception):
    """Raised inside the layer, at the places that a life chooses."""


@dataclass
class Row:
    """A row's tokens [n, WIDTH], what the layer gave for each, and how many of those are known to be right."""

    tokens: Tensor
    outs: Tensor
    checked: int = 0
    peak: int = 0  # the longest that it has been

    @classmethod
    def empty(cls) -> "Row":
        return cls(*torch.empty(2, 0, WIDTH, dtype=torch.float64))


class Life:
    """`Life(seed).live()` raises AssertionError where a cache is wrong; `story` says what happened until then."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        torch.manual_seed(seed)
        self.story: list[str] = []
        pick = self.random.choice
        self.config = random_config(self.random)
        g, group = pick((1, 2)), pick((1, 3))
        made = NativeSparseAttention(
            WIDTH, g * group, g, pick((2, 4)), pick((2, 3)), self.config, bias=pick((False, True))
        )
        self.layer = moved(made.double(), 0.4)
        self.max_crop, self.max_new = pick((0, 1, 5, 20)), pick((1, 3, 16))
        self.page_size = math.lcm(self.config.select_block_size, 16) * pick((1, 2))
        self.max_length, self.num_pages = pick((30, 64, 100, 200)), pick((3, 6, 12, 40))
        self.cache = self.new_cache()
        self.rows: list[Row] = []
        self.tell(f"{self.config} max_crop={self.max_crop} max_new={self.max_new} {type(self.cache).__name__}")

    def tell(self, what: str) -> None:
        self.story.append(what)

    def new_cache(self) -> LayerCache:
        kind = self.random.choice(("growing", "static", "paged"))
        if kind == "growing":
            return NSACache(self.config, max_crop=self.max_crop)
        sizes = {"max_crop": self.max_crop, "max_new": self.max_new}
        if kind == "static":
            return StaticNSACache(self.config, self.max_length, **sizes)
        return PagedNSACache(self.config, self.num_pages, page_size=self.page_size, max_length=self.max_length, **sizes)

    @property
    def lengths(self) -> list[int]:
        return [len(row.tokens) for row in self.rows]

    def live(self) -> None:
        deeds = [self.feed] * 9 + [self.fail] * 2 + [self.crop] * 2
        deeds += [self.reorder, self.move, self.forget, self.undo, self.wait]
        for _ in range(self.random.randint(3, 14)):
            self.random.choice(deeds)()
            if self.random.random() < 0.3:  # a question makes the host's bounds exact, so it is not always asked
                self.same_lengths()
        self.same_lengths()
        self.check()
        if isinstance(self.cache, PagedNSACache):
            self.cache.clear()
            assert self.cache.num_pages_used == 0, "pages that nobody holds"

    def same_lengths(self) -> None:
        assert sum(self.cache.lengths) == sum(self.lengths), (self.cache.lengths, self.lengths)
        assert not sum(self.lengths) or self.cache.lengths == self.lengths, (self.cache.lengths, self.lengths)

    def check(self) -> None:
        """Everything that came out so far, against whole forwards, a row at a time."""
        for row in self.rows:
            if row.checked < len(row.tokens):
                with torch.no_grad():
                    whole = self.layer(row.tokens[None])[0, row.checked :]
                torch.testing.assert_close(row.outs[row.checked :], whole, rtol=1e-9, atol=1e-9)
                row.checked = len(row.tokens)

    # ---- deeds -------------------------------------------------------------------------------------------------

    def mode(self) -> AbstractContextManager[None]:
        modes: list[Callable[[], AbstractContextManager[None]]] = [torch.no_grad, torch.inference_mode]
        if isinstance(self.cache, NSACache):
            modes.append(torch.enable_grad)
        mode = self.random.choice(modes)
        self.tell(f"  {mode.__name__}")
        return mode()

    def tokens(self) -> tuple[Tensor, Tensor | None]:
        """x [b, t, WIDTH] and a mask of at least t columns."""
        most = 16 if isinstance(self.cache, NSACache) else self.max_new
        t = self.random.choice((0, 1, 1, 1, self.random.randint(1, most), self.random.randint(1, 45)))
        b, lengths = len(self.rows) or self.random.randint(1, 4), self.lengths or [0]
        kind = self.random.choice(("none", "none", "ones", "ragged", "holes", "waiting", "level"))
        if kind == "level":  # rows of one length, by different steps
            t = max(lengths) - min(lengths) + self.random.randint(0, 3)
        x, mask = torch.randn(b, t, WIDTH, dtype=torch.float64), torch.ones(b, t, dtype=torch.bool)
        if kind == "level":
            mask = torch.arange(t) >= torch.tensor([length - min(lengths) for length in lengths])[:, None]
            mask = mask.expand(b, t).clone()
        if kind == "ragged":
            for row in mask:
                row[: self.random.randint(0, t)] = False
        elif kind == "holes":
            mask = torch.rand(b, t) > 0.3
        elif kind == "waiting":
            mask &= torch.rand(b, 1) > 0.4
        before = torch.rand(b, self.random.choice((0, 3))) > 0.5
        return x, None if kind == "none" else torch.cat([before, mask], dim=1).long()

    def wait(self) -> None:
        """One row goes on, token by token; the others sit these steps out."""
        going = self.random.randrange(max(1, len(self.rows)))
        for _ in range(self.random.choice((3, 10, 40))):
            b = len(self.rows) or 2
            mask = (torch.arange(b) == going).long()[:, None]
            self.feed(torch.randn(b, 1, WIDTH, dtype=torch.float64), mask)

    def feed(self, x: Tensor | None = None, mask: Tensor | None = None) -> None:
        if x is None:
            x, mask = self.tokens()
        b, t, _ = x.shape
        own = torch.ones(b, t, dtype=torch.bool) if mask is None else mask[:, mask.shape[1] - t :].bool()
        counts = own.sum(1).tolist()
        self.rows = self.rows or [Row.empty() for _ in range(b)]
        self.tell(f"feed {t} columns, {counts} tokens behind {self.lengths}")
        ends = [n + count for n, count in zip(self.lengths, counts, strict=True)]
        with self.mode():
            out = self.refusable(lambda: self.layer(x, cache=self.cache, attention_mask=mask), self.may_refuse(ends))
        if out is None:
            return
        assert isinstance(self.cache, NSACache) or max(ends) <= self.max_length, "past the end"
        out = out.detach()
        padding = torch.zeros(WIDTH) if self.layer.o_proj.bias is None else self.layer.o_proj.bias.detach()
        torch.testing.assert_close(out[~own], padding.double().expand_as(out[~own]))
        for row, one in enumerate(self.rows):
            one.tokens = torch.cat([one.tokens, x[row, own[row]]])
            one.outs = torch.cat([one.outs, out[row, own[row]]])
            one.peak = max(one.peak, len(one.tokens))

    def refusable(self, call: Callable[[], Any], may_refuse: bool) -> Any:
        """What the call gives; None where it is refused, in one line and with reason."""
        try:
            return call()
        except ValueError as error:
            refusal = str(error)
        self.tell(f"  refused: {refusal}")
        assert may_refuse, refusal
        assert "\n" not in refusal
        return None

    def may_refuse(self, ends: list[int]) -> bool:
        if isinstance(self.cache, NSACache):
            return False
        pages = sum(-(-end // self.page_size) for end in ends)
        return max(ends, default=0) > self.max_length or (
            isinstance(self.cache, PagedNSACache) and pages > self.num_pages
        )

    def fail(self) -> None:
        """A call that raises, at a place of its own, leaves no trace."""
        x, mask = self.tokens()
        layer, hook, cache = self.layer, None, self.cache
        kind = self.random.choice(("o_proj", "compress_v", "rows", "dtype", "config", "graph", "crop", "reorder"))
        self.tell(f"fail by {kind}, {list(x.shape)} behind {self.lengths}")
        if kind in ("o_proj", "compress_v"):
            hook = getattr(layer, kind).register_forward_pre_hook(sabotage)
        elif kind == "rows":
            x, mask = torch.cat([x, x[:1]]), None
        elif kind == "dtype":
            x, layer = x.float(), copy.deepcopy(layer).float()
        elif kind == "config":
            layer = copy.copy(layer)
            layer.blocks = replace(self.config, window_size=self.config.window_size + 1)
        calls: dict[str, Callable[[], Any]] = {
            "crop": lambda: cache.crop(self.random.choice((-1, max(self.lengths, default=0) + 1))),
            "reorder": lambda: cache.reorder(torch.tensor([0, len(self.rows)])),
        }
        has_failed = False
        with torch.enable_grad() if kind == "graph" else torch.no_grad():
            try:
                calls.get(kind, lambda: layer(x, cache=cache, attention_mask=mask))()
            except (ValueError, SabotageError) as error:
                has_failed = "\n" not in str(error)
        if hook is not None:
            hook.remove()
        if not has_failed:
            # Nothing of the kind came to pass: no block was complete, there were no tokens, or a graph is welcome.
            is_harmless = kind == "compress_v" or (kind == "graph" and isinstance(cache, NSACache))
            assert is_harmless or not sum(self.lengths), f"{kind} was taken"
            self.rows, self.cache = [], self.new_cache()
            self.tell(f"  it passed; a new {type(self.cache).__name__}")

    def undo(self) -> None:
        """Several calls in one transaction that fails."""
        self.tell("transaction")
        kept = [replace(row) for row in self.rows]
        try:
            with self.cache.transaction():
                for _ in range(self.random.randint(1, 6)):
                    self.feed()
                raise SabotageError
        except SabotageError:
            self.check()
            self.rows = kept
        self.tell(f"  taken back to {self.lengths}")

    def crop(self) -> None:
        if not self.rows:
            return
        count = self.random.randint(0, self.random.choice((1, 3, max(1, self.max_crop), 40)))
        self.tell(f"crop {count} of {self.lengths}")
        certain = all(
            len(row.tokens) >= count and row.peak - len(row.tokens) + count <= self.max_crop for row in self.rows
        )
        self.check()
        if self.refusable(lambda: self.cache.crop(count) or "done", not certain) is None:
            return
        for row in self.rows:
            left = len(row.tokens) - count
            row.tokens, row.outs, row.checked = row.tokens[:left], row.outs[:left], min(row.checked, left)

    def reorder(self) -> None:
        if not self.cache.lengths:
            return
        rows = [self.random.randint(-1, len(self.rows) - 1) for _ in range(self.random.randint(1, 5))]
        self.tell(f"reorder {rows} of {self.lengths}")
        self.cache.reorder(torch.tensor(rows))
        self.rows = [replace(self.rows[row]) if row >= 0 else Row.empty() for row in rows]

    def move(self) -> None:
        target = self.new_cache()
        self.tell(f"move {self.lengths} to {type(target).__name__}")
        self.cache, source = target, self.cache
        if self.refusable(lambda: convert(source, target), self.may_refuse(self.lengths)) is None:
            assert not target.lengths
            self.cache = source
            return
        if not target.lengths:
            self.rows = []

    def forget(self) -> None:
        if self.random.random() < 0.5:
            return
        self.tell("clear")
        self.check()
        self.cache.clear()
        self.rows = [Row.empty() for _ in self.rows] if self.cache.lengths else []


def sabotage(*_: object) -> None:
    raise SabotageError


def random_config(rng: random.Random) -> NSAConfig:
    stride, first, local = rng.choice((1, 2, 4)), rng.choice((1, 2)), rng.choice((1, 2, 3))
    blocks = rng.randint(1, 3)
    return NSAConfig(
        compress_block_size=stride * blocks, compress_stride=stride,
        select_block_size=stride * rng.randint(blocks, 4), num_selected_blocks=first + local + rng.randint(0, 2),
        num_initial_blocks=first, num_local_blocks=local, window_size=rng.choice((1, 2, 5, 12, 30)),
        compression=rng.choice(("mean", "linear", "mlp")), shared_kv=rng.random() < 0.3,
    )  # fmt: skip
