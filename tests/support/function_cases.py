"""Random calls of the function: sizes, layouts, dtypes, strides; and what the brute force says of them."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from layouts import Layout
from torch import Tensor

from nsa.config import NSAConfig
from nsa.functional import native_sparse_attention
from nsa.testing import assert_close_to_fp64, per_sequence
from nsa.testing import brute_force as paper

# Names of the key dimension of a member of the batch, by tensor.
DIMENSIONS = {"q": "queries", "gates": "queries", "k": "keys", "v": "keys", "k_cmp": "blocks", "v_cmp": "blocks"}


def _wider(x: Tensor, dim: int) -> Tensor:
    """Every second line of a tensor whose other lines are NaN."""
    return torch.stack([x, torch.full_like(x, torch.nan)], dim=dim + 1).flatten(dim, dim + 1)[
        (slice(None),) * dim + (slice(None, None, 2),)
    ]


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "heads before tokens": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "dims before all": lambda x: x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
    "every second token": lambda x: _wider(x, 1),
    "every second head": lambda x: _wider(x, 2),
    "every second number": lambda x: _wider(x, 3),
    "one row for all": lambda x: x[:1].expand_as(x),
    "one head for all": lambda x: x[:, :, :1].expand_as(x),
}


@dataclass(frozen=True)
class FunctionCase:
    layout: Layout
    config: NSAConfig
    tensors: dict[str, Tensor]  # in the strides under test
    options: dict[str, Any]
    window_lengths: list[int] | None  # keys that k_win holds of each row, the last ones
    description: str

    def actual(self, tensors: dict[str, Tensor], backend: str) -> Tensor:
        return native_sparse_attention(
            **tensors, config=self.config, **self.layout.lengths(), **self.options, backend=backend
        )

    def expected(self, tensors: dict[str, Tensor]) -> Tensor:
        """The brute force in the tensors' dtype."""
        layout = self.layout
        if tensors["q"].numel() == 0 or not layout.members(self.config):
            return tensors["q"].new_zeros(*tensors["q"].shape[:3], tensors["v"].shape[3])

        def one(member) -> tuple[Tensor]:
            own = {name: getattr(member, DIMENSIONS[name])(x) for name, x in tensors.items() if name in DIMENSIONS}
            for name in ("k_win", "v_win"):
                if name in tensors:
                    own[name] = self._window_keys(member, tensors[name])
            return (paper.native_sparse_attention(**own, config=self.config, scale=self.options.get("scale")),)

        return per_sequence(layout.members(self.config), one)[0]

    def _window_keys(self, member, x: Tensor) -> Tensor:
        """Of the whole sequence; those that k_win does not hold, and no query sees, are 0."""
        if self.window_lengths is None:
            return member.keys(x)
        held = self.window_lengths[member.row]
        return torch.cat([x.new_zeros(member.length - held, *x.shape[2:]), x[member.row, :held]])


def make_case(seed: int, *, largest: int = 40, rows: int = 60, multiple: int = 1, dtypes=None) -> FunctionCase:
    """The case of a seed, of at most so many tokens and about so many queries times heads; head dims are multiples."""
    chance = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    dtype = chance.choice(dtypes or [torch.float64] * 4 + [torch.float32, torch.bfloat16, torch.float16])
    has_own = {branch: chance.random() < 0.4 for branch in ("cmp", "win")}
    # In 16 bits block means are rounded: only what leaves no choice selects the same blocks as the truth.
    config = _config(chance, may_choose=dtype in (torch.float64, torch.float32) or has_own["cmp"])
    layout = _layout(chance, config, largest)
    g = chance.choice([1, 1, 2, 3])
    group = chance.choice([1, 1, 2, 3, 4, 5])
    h = g * max(1, min(group, rows // max(1, layout.b * layout.t * g)))
    d, e = (multiple * chance.choice([1, 2, 3, 4, 5]) for _ in range(2))
    e = d if chance.random() < 0.4 else e  # as PyTorch's own kernel needs it
    window_lengths = _window_lengths(chance, layout, config) if has_own["win"] else None
    shapes = {"q": (layout.t, h, d), "k": (layout.s, g, d), "v": (layout.s, g, e), "gates": (layout.t, h, 3)}
    is_packed = layout.cu_seqlens_q is not None
    blocks = layout.num_compressed_blocks(config) if is_packed else config.num_compressed_blocks(layout.s)
    held = layout.s if window_lengths is None else max(window_lengths, default=0)
    for branch, count in (("cmp", blocks), ("win", held)):
        if has_own[branch]:
            shapes |= {f"k_{branch}": (count, g, d), f"v_{branch}": (count, g, e)}
    tensors, strides = {}, {}
    size = chance.choice([1.0, 1.0, 0.01, 8.0])
    for name, shape in shapes.items():
        x = torch.randn(layout.b, *shape, generator=generator, dtype=torch.float64)
        x = x.sigmoid() if name == "gates" and chance.random() < 0.7 else size * x if name == "q" else x
        if name == "gates":
            x = x.to(torch.float32 if chance.random() < 0.3 and dtype != torch.float64 else dtype)
        else:
            x = x.to(dtype)
            _spoil(x, name, layout, config, window_lengths)
        strides[name] = chance.choice(list(STRIDES)) if chance.random() < 0.6 else "contiguous"
        if strides[name] == "one row for all" and layout.seqlens_k is not None:
            strides[name] = "contiguous"  # the rows are spoiled in different places
        tensors[name] = STRIDES[strides[name]](x)
    options: dict[str, Any] = {}
    if chance.random() < 0.3:
        options["scale"] = chance.choice([1.0, 0.3, 2.0])
    if window_lengths is not None and layout.seqlens_k is not None:
        options["seqlens_win"] = torch.tensor(window_lengths, dtype=chance.choice([torch.int32, torch.int64]))
    description = f"seed {seed}: {dtype}, {layout}, {config}, h={h}, g={g}, d={d}, e={e}, {strides}, {options}"
    return FunctionCase(layout, config, tensors, options, window_lengths, description)


def check(case: FunctionCase, backend: str, *, gradients: bool) -> None:
    """Output, and gradients of everything, within the budget; in fp64 to 1e-10."""
    names = list(case.tensors)

    def found(
        function: Callable[[dict[str, Tensor]], Tensor], cast: torch.dtype | None, scale: float = 1.0
    ) -> list[Tensor]:
        """Output and gradients, those for `scale` times d_out divided by it."""
        leaves = {
            name: (x.detach() if cast is None else x.detach().contiguous().to(cast)).requires_grad_(gradients)
            for name, x in case.tensors.items()
        }
        out = function(leaves)
        if not gradients or out.numel() == 0:
            return [out.detach()]
        d_out = torch.linspace(-1.0, 1.0, out.numel(), dtype=dtype).view(out.shape).to(out.dtype)  # the same for all
        grads = torch.autograd.grad(out, list(leaves.values()), scale * d_out, allow_unused=True)
        return [
            out.detach(),
            *(torch.zeros_like(x) if y is None else y / scale for x, y in zip(leaves.values(), grads, strict=True)),
        ]

    dtype = case.tensors["q"].dtype
    actual = found(lambda x: case.actual(x, backend), None)
    truth = found(case.expected, torch.float64)
    plain = truth
    if dtype != torch.float64:
        # A few numbers may come out right by luck: plain PyTorch's error is the largest of several roundings.
        tries = [found(case.expected, dtype, scale) for scale in ((1.0, 1.1, 1.3, 1.7) if gradients else (1.0,))]
        plain = [max(ways, key=lambda x, t=t: _largest(x.double() - t)) for t, *ways in zip(truth, *tries, strict=True)]
    for name, x, p, t in zip(("out", *(f"d{name}" for name in names)), actual, plain, truth, strict=False):
        assert x.shape == t.shape, f"{name}: {case.description}"
        if dtype == torch.float64:
            torch.testing.assert_close(
                x.double(), t, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}\n{case.description}"
            )
        elif t.numel():
            # A gradient's terms may cancel, with one key in exact arithmetic to 0: what is left has their rounding.
            terms = _largest(case.tensors["q"]) * _largest(case.tensors["v"]) * _largest(case.tensors["k"])
            if name != "out" and not t.any():
                assert _largest(x) <= 100 * torch.finfo(dtype).eps * (1 + terms), f"{name}: {case.description}"
                continue
            lost = 0.0 if name == "out" else terms / _largest(t)
            assert_close_to_fp64(x, p.to(x.dtype), t, f"{name}: {case.description}", largest_score=100.0 + lost)


def _largest(x: Tensor) -> float:
    """Of what is not padding."""
    return max(map(abs, x.nan_to_num().flatten().tolist()), default=0.0)


def _config(chance: random.Random, may_choose: bool) -> NSAConfig:
    stride = chance.choice([1, 2, 3, 4])
    block = stride * chance.choice([1, 2, 3])
    select = stride * chance.choice([x for x in range(1, 5) if x * stride >= block])
    initial, local = chance.choice([(1, 2), (1, 1), (2, 2)])
    return NSAConfig(
        compress_block_size=block,
        compress_stride=stride,
        select_block_size=select,
        num_initial_blocks=initial,
        num_local_blocks=local,
        num_selected_blocks=initial + local + (chance.choice([0, 1, 3]) if may_choose else 0),
        window_size=chance.choice([1, 2, 3, 5, 8, 13, 50]),
    )


def _length(chance: random.Random, config: NSAConfig, largest: int) -> int:
    """Short, or around a block's end."""
    if chance.random() < 0.35:
        return chance.randint(0, 3)
    block = chance.choice(
        [
            config.compress_stride,
            config.compress_block_size,
            config.select_block_size,
            config.window_size,
            config.num_selected_blocks * config.select_block_size,
        ]
    )
    return max(0, min(largest, block * chance.randint(1, 5) + chance.randint(-1, 1)))


def _layout(chance: random.Random, config: NSAConfig, largest: int) -> Layout:
    kind = chance.choice(["uniform", "suffix", "packed", "packed suffixes", "ragged"])
    if kind in ("uniform", "suffix"):
        s = _length(chance, config, largest)
        t = s if kind == "uniform" else chance.randint(0, s)
        return Layout(b=chance.choice([1, 1, 2, 3, 0]), t=t, s=s)
    if kind == "ragged":
        b = chance.choice([1, 2, 3])
        lengths = tuple(_length(chance, config, largest) for _ in range(b))
        t = chance.choice([0, 1, 2, 3, chance.randint(0, largest)])
        return Layout(b=b, t=t, s=max(lengths) + chance.choice([0, 0, 1, 7]), seqlens_k=lengths)
    keys = [_length(chance, config, largest // 2) for _ in range(chance.randint(0, 4))]
    queries = keys if kind == "packed" else [chance.randint(0, many) for many in keys]
    cu_q, cu_k = (tuple(sum(x[:i]) for i in range(len(x) + 1)) for x in (queries, keys))
    return Layout(t=cu_q[-1], s=cu_k[-1], cu_seqlens_q=cu_q, cu_seqlens_k=None if kind == "packed" else cu_k)


def _window_lengths(chance: random.Random, layout: Layout, config: NSAConfig) -> list[int] | None:
    """How many keys k_win holds of each row, at least those that its queries see; None: all."""
    if layout.b == 0 or layout.cu_seqlens_q is not None or chance.random() < 0.4:
        return None
    lengths = [layout.s] * layout.b if layout.seqlens_k is None else list(layout.seqlens_k)
    needed = [min(length, layout.t + config.window_size - 1) for length in lengths]
    if layout.seqlens_k is None:
        return [chance.randint(needed[0], layout.s)] * layout.b
    return [chance.randint(low, high) for low, high in zip(needed, lengths, strict=True)]


def _spoil(x: Tensor, name: str, layout: Layout, config: NSAConfig, window_lengths: list[int] | None) -> None:
    """NaN in all that is padding: it is never read."""
    for row, length in enumerate(layout.seqlens_k or ()):
        if name == "q":
            x[row, : max(0, layout.t - length)] = torch.nan
        elif name in ("k", "v"):
            x[row, length:] = torch.nan
        elif name.endswith("_cmp"):
            x[row, config.num_compressed_blocks(length) :] = torch.nan
        elif name.endswith("_win"):
            x[row, length if window_lengths is None else window_lengths[row] :] = torch.nan
