"""The three attentions and the tilings of the selected one behind one face: inputs, op, fp64 truth."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from layouts import Layout
from torch import Tensor

from nsa.config import NSAConfig
from nsa.ops.compressed_attention import compressed_attention
from nsa.ops.selected_attention import selected_attention
from nsa.ops.window_attention import window_attention
from nsa.testing import INPUT_FAMILIES, InputShape, Member, per_sequence
from nsa.testing import brute_force as paper
from nsa.testing.brute_force_selection import num_selection_blocks, query_positions, select_blocks

SMALL = NSAConfig(compress_block_size=4, compress_stride=2, select_block_size=8, num_selected_blocks=4, window_size=6)


@dataclass(frozen=True)
class Case:
    """Inputs of one branch; k, v are compressed ones for the compressed branch."""

    layout: Layout
    config: NSAConfig
    q: Tensor
    k: Tensor
    v: Tensor
    block_indices: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    def to(self, dtype: torch.dtype) -> "Case":
        return Case(self.layout, self.config, *(x.to(dtype) for x in self.tensors), self.block_indices)


@dataclass(frozen=True)
class Branch:
    op: Callable[..., tuple[Tensor, Tensor]]  # (case, q, k, v, scale) -> out, lse
    truth: Callable[..., tuple[Tensor, Tensor]]  # the same by brute force, for one member
    visible: Callable[[Case, Member, int, int, int], list[int]]  # (case, member, row, position, group) -> keys
    compressed: bool = False

    def case(
        self,
        layout: Layout,
        config: NSAConfig = SMALL,
        *,
        family: str = "random",
        h: int = 4,
        g: int = 2,
        d: int = 3,
        e: int = 5,
        seed: int = 0,
    ) -> Case:
        generator = torch.Generator().manual_seed(seed)
        num_keys = layout.num_compressed_blocks(config) if self.compressed else layout.s
        shape = InputShape(b=layout.b, t=layout.t, s=num_keys, h=h, g=g, d=d, e=e)
        q, k, v = INPUT_FAMILIES[family](generator, shape)
        return Case(layout, config, q, k, v, random_selection(layout, config, g, generator))

    def run(self, case: Case, *tensors: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
        return self.op(case, *(tensors or case.tensors), scale)

    def expected(self, case: Case, *tensors: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
        q, k, v = tensors or case.tensors

        def one(member: Member) -> tuple[Tensor, Tensor]:
            take = member.blocks if self.compressed else member.keys
            return self.truth(case, member, member.queries(q), take(k), take(v), scale)

        return per_sequence(case.layout.members(case.config), one)

    def plain(self, case: Case, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """The same in plain PyTorch, in the inputs' dtype: a full score matrix under a mask."""
        queries, keys, values = tensors or case.tensors

        def one(member: Member) -> tuple[Tensor, Tensor]:
            take = member.blocks if self.compressed else member.keys
            q, k, v = member.queries(queries), take(keys), take(values)
            heads_per_group = q.shape[1] // k.shape[1]
            mask = torch.zeros(q.shape[1], q.shape[0], k.shape[0], dtype=torch.bool)
            for row, position in enumerate(query_positions(q.shape[0], member.length)):
                for head in range(q.shape[1]):
                    mask[head, row, self.visible(case, member, row, position, head // heads_per_group)] = True
            k, v = (x.repeat_interleave(heads_per_group, 1).transpose(0, 1) for x in (k, v))
            scores = (q.transpose(0, 1) @ k.transpose(1, 2) * q.shape[2] ** -0.5).masked_fill(~mask, -torch.inf)
            p = torch.softmax(scores, dim=-1).masked_fill(~mask, 0.0)
            return (p @ v).transpose(0, 1), scores.logsumexp(-1).transpose(0, 1)

        return per_sequence(case.layout.members(case.config), one)


def random_selection(layout: Layout, config: NSAConfig, g: int, generator: torch.Generator) -> Tensor:
    """A selection by random scores: forced blocks, -1 where there are too few."""

    def one(member: Member) -> tuple[Tensor, ...]:
        num_queries = member.query_range.stop - member.query_range.start
        sizes = (num_queries, g, num_selection_blocks(member.length, config))
        scores = torch.rand(sizes, generator=generator, dtype=torch.float64)
        return (select_blocks(scores, member.length, config),)

    return per_sequence(layout.members(config), one)[0]


def _selected(tiling: str | None) -> Branch:
    return Branch(
        op=lambda case, q, k, v, scale: selected_attention(
            q,
            k,
            v,
            case.block_indices,
            case.config,
            sequences=case.layout.sequences(),
            scale=scale,
            tiling=tiling,
        ),
        truth=lambda case, member, q, k, v, scale: paper.selected_attention(
            q, k, v, member.queries(case.block_indices), case.config, scale
        ),
        visible=lambda case, member, row, position, group: paper.visible_selected(
            position, member.length, member.queries(case.block_indices)[row, group].tolist(), case.config
        ),
    )


BRANCHES = {
    "compressed": Branch(
        op=lambda case, q, k, v, scale: compressed_attention(
            q,
            k,
            v,
            case.config,
            num_keys=case.layout.s,
            sequences=case.layout.sequences(),
            scale=scale,
        ),
        truth=lambda case, member, q, k, v, scale: paper.compressed_attention(
            q, k, v, member.length, case.config, scale
        ),
        visible=lambda case, member, _row, position, _group: paper.visible_compressed(
            position, member.length, case.config
        ),
        compressed=True,
    ),
    "selected": _selected(None),
    "selected by query": _selected("by_query"),
    "selected by block": _selected("by_block"),
    "selected masked": _selected("masked"),
    "window": Branch(
        op=lambda case, q, k, v, scale: window_attention(
            q, k, v, case.config.window_size, sequences=case.layout.sequences(), scale=scale
        ),
        truth=lambda case, _member, q, k, v, scale: paper.window_attention(q, k, v, case.config.window_size, scale),
        visible=lambda case, member, _row, position, _group: paper.visible_window(
            position, member.length, case.config.window_size
        ),
    ),
}
