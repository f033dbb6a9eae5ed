"""One case of the GPU grid: inputs, and every kernel against fp64 within the budget that plain PyTorch sets."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from dense_reference import Visible, masked_attention
from layouts import Layout as TestLayout
from torch import Tensor

from nsa.config import NSAConfig
from nsa.kernels.attention import Layouts, Saved, attention_backward
from nsa.kernels.contiguous_backward import contiguous_backward
from nsa.kernels.contiguous_forward import contiguous_forward
from nsa.kernels.layout import Layout
from nsa.kernels.rows import combine, rowsum_delta
from nsa.kernels.selected_forward import selected_forward
from nsa.kernels.selected_gradients import selected_gradients
from nsa.kernels.selection import select_top_blocks
from nsa.testing import INPUT_FAMILIES, InputShape, assert_close_to_fp64, assert_same_selection

DEFAULT = NSAConfig()


def whole(length: int, b: int = 1) -> TestLayout:
    return TestLayout(b=b, t=length, s=length)


@dataclass(frozen=True, kw_only=True)
class Case:
    layout: TestLayout = field(default_factory=lambda: whole(513))
    config: NSAConfig = DEFAULT
    dtype: torch.dtype = torch.bfloat16
    h: int = 16
    g: int = 1
    d: int = 64
    e: int = 64
    family: str = "random"

    def __str__(self) -> str:
        layout = ",".join(f"{k}{v}" for k, v in vars(self.layout).items() if v is not None).replace(" ", "")
        dtype = str(self.dtype).removeprefix("torch.")
        c = self.config
        sizes = f"{c.compress_block_size}/{c.compress_stride}/{c.select_block_size}/{c.num_selected_blocks}"
        return f"{layout}-{dtype}-h{self.h}g{self.g}-d{self.d}e{self.e}-{sizes}w{c.window_size}-{self.family}"


class Run:
    """The inputs of a case on a device, and its checks."""

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.device = case, device
        layout, config = case.layout, case.config
        lengths = {name: x.to(device) for name, x in layout.lengths().items()}
        b, t, s = layout.b, layout.t, layout.s
        self.raw = Layout(b, t, s, **lengths)
        self.cmp = Layout(b, t, s, config.compress_block_size, config.compress_stride, **lengths)
        self.visible = Visible(layout, config, device)
        self.scale = case.d**-0.5
        generator = torch.Generator().manual_seed(0)
        make = INPUT_FAMILIES[case.family]

        def inputs(keys: int) -> tuple[Tensor, ...]:
            shape = InputShape(b=b, t=t, s=keys, h=case.h, g=case.g, d=case.d, e=case.e)
            return tuple(x.to(device, case.dtype) for x in make(generator, shape))

        self.q, self.k, self.v = inputs(s)
        _, self.k_win, self.v_win = inputs(s)
        num_compressed = layout.num_compressed_blocks(config)
        if num_compressed:
            _, self.k_cmp, self.v_cmp = inputs(num_compressed)
        else:
            self.k_cmp, self.v_cmp = self.k[:, :0], self.v[:, :0]
        self.d_out = torch.randn(b, t, case.h, case.e, generator=generator).to(device, case.dtype)
        self.d_lse = torch.randn(b, t, case.h, generator=generator).to(device)
        self.gates = torch.rand(b, t, case.h, 3, generator=generator).to(device, case.dtype)

    # ---- one branch: output, lse and gradients ----------------------------------------------------------

    def window(self) -> None:
        window = self.case.config.window_size
        self._branch(
            "window",
            (self.q, self.k_win, self.v_win),
            self.visible.window(),
            lambda q, k, v: contiguous_forward(q, k, v, self.raw, window, self.scale),
            lambda q, k, v, *rest: contiguous_backward(q, k, v, *rest, self.raw, window, self.scale),
        )

    def compressed(self) -> None:
        self._branch(
            "compressed",
            (self.q, self.k_cmp, self.v_cmp),
            self.visible.compressed(),
            lambda q, k, v: contiguous_forward(q, k, v, self.cmp, None, self.scale),
            lambda q, k, v, *rest: contiguous_backward(q, k, v, *rest, self.cmp, None, self.scale),
        )

    def selected(self) -> None:
        indices = self.block_indices()
        rest = (self.raw, self.case.config, self.scale)

        def backward(q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, lse: Tensor, delta: Tensor):
            return selected_gradients(q, k, v, indices, d_out, lse, delta, *rest)

        self._branch(
            "selected",
            (self.q, self.k, self.v),
            self.visible.selected(indices),
            lambda q, k, v: selected_forward(q, k, v, indices, *rest),
            backward,
        )

    def block_indices(self) -> Tensor:
        _, lse = contiguous_forward(self.q, self.k_cmp, self.v_cmp, self.cmp, None, self.scale)
        return select_top_blocks(self.q, self.k_cmp, lse, self.cmp, self.case.config, self.scale)

    def selection(self) -> None:
        config = self.case.config
        truth = self.visible.block_scores(self.q.double(), self.k_cmp.double(), self.scale)
        # Scores are summed in fp32, whatever the inputs' dtype: the budget is that of fp32.
        plain = self.visible.block_scores(self.q.float(), self.k_cmp.float(), self.scale)
        assert_same_selection(self.block_indices(), truth, self.visible.position, config, plain_scores=plain)

    def whole(self) -> None:
        """The gated sum of the branches and all its gradients, the gates folded into the log-sum-exps."""
        indices = self.block_indices()
        names = ("q", "k_cmp", "v_cmp", "k", "v", "k_win", "v_win", "gates")
        inputs = [getattr(self, name) for name in names]
        masks = (self.visible.compressed(), self.visible.selected(indices), self.visible.window())

        def reference(dtype: torch.dtype) -> list[Tensor]:
            xs = [x.detach().to(dtype).requires_grad_() for x in inputs]
            q, *keys, gates = xs
            outs = [masked_attention(q, *keys[2 * i : 2 * i + 2], masks[i], self.scale)[0] for i in range(3)]
            out = sum(gates[..., i : i + 1] * outs[i] for i in range(3))
            return [out.detach(), *torch.autograd.grad(out, xs, self.d_out.to(dtype))]

        q, k_cmp, v_cmp, k, v, k_win, v_win, gates = inputs
        config, scale = self.case.config, self.scale
        branches = (
            contiguous_forward(q, k_cmp, v_cmp, self.cmp, None, scale),
            selected_forward(q, k, v, indices, self.raw, config, scale),
            contiguous_forward(q, k_win, v_win, self.raw, config.window_size, scale),
        )
        outs, lses = (tuple(branch[i] for branch in branches) for i in range(2))
        saved = Saved(outs, lses, indices)
        keys = ((k_cmp, v_cmp), (k, v), (k_win, v_win))
        layouts = Layouts(self.cmp, self.raw, self.raw)
        grads = attention_backward(q, keys, gates, self.d_out, saved, layouts, config, scale)
        actual = [combine(*outs, gates), *grads]
        for name, x, plain, truth in zip(
            ("out", *names), actual, reference(self.case.dtype), reference(torch.float64), strict=True
        ):
            self._compare(f"whole {name}", x, plain, truth)

    # ---- the comparison ---------------------------------------------------------------------------------

    def _branch(
        self, name: str, inputs: tuple[Tensor, ...], visible: Tensor,
        forward: Callable[..., tuple[Tensor, Tensor]], backward: Callable[..., tuple[Tensor, ...]],
    ) -> None:  # fmt: skip
        out, lse = forward(*inputs)
        seen = visible.any(-1).repeat_interleave(self.case.h // visible.shape[1], 1).transpose(1, 2)
        d_lse = self.d_lse * seen
        delta = rowsum_delta(out, self.d_out, d_lse)
        grads = backward(*inputs, self.d_out, lse, delta)

        def reference(dtype: torch.dtype) -> list[Tensor]:
            xs = [x.detach().to(dtype).requires_grad_() for x in inputs]
            r_out, r_lse = masked_attention(*xs, visible, self.scale)
            finite = torch.where(seen, r_lse, 0.0)
            loss = (r_out * self.d_out.to(dtype)).sum() + (finite * d_lse).sum()
            found = torch.autograd.grad(loss, xs)
            return [r_out.detach(), r_lse.detach(), *found]

        plain, truth = reference(self.case.dtype), reference(torch.float64)
        for part, x, p, r in zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), plain, truth, strict=True):
            self._compare(f"{name} {part}", x, p.to(x.dtype), r)

    def _compare(self, name: str, actual: Tensor, plain: Tensor, truth: Tensor) -> None:
        if truth.numel() and not truth.any():
            # A query with one key: its terms cancel, in fp64 exactly, in fp32 up to their own rounding.
            widest = max(float(x.float().norm(dim=-1).amax()) for x in (self.v, self.v_win, self.v_cmp) if x.numel())
            terms = widest * float(self.d_out.float().norm(dim=-1).amax()) * float(self.q.float().abs().amax())
            assert float(actual.float().abs().max()) <= torch.finfo(torch.float32).eps * terms * self.scale, name
            return
        largest = float(self.q.float().norm(dim=-1).amax() * self.k.float().norm(dim=-1).amax() * self.scale)
        assert_close_to_fp64(actual, plain, truth, name, largest_score=largest)


CHECKS = ("compressed", "window", "selection", "selected", "whole")
