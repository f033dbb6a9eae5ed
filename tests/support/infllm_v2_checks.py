"""InfLLM-V2 on the kernels against fp64, PyTorch's operations for the budget; on a GPU and in the interpreter."""

from unittest.mock import patch

import torch
from layouts import Layout

from nsa.config import InfLLMv2Config
from nsa.kernels import pooled_selection
from nsa.methods import infllm_v2
from nsa.ops.compress import compress, phi_mean
from nsa.ops.pooled_selection import pooled_scores, select_by_pooled_keys
from nsa.testing import assert_close_to_fp64, assert_same_selection


def check(
    layout: Layout, config: InfLLMv2Config, dtype: torch.dtype, device: str, *, h: int, g: int, d: int, e: int
) -> None:
    """The kernels' choice by its scores; then output and gradients, all sides reading what the kernels chose."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = ((layout.b, layout.t, h, d), (layout.b, layout.s, g, d), (layout.b, layout.s, g, e))
    tensors = [torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes]
    d_out = torch.randn(layout.b, layout.t, h, e, generator=generator, device=device).to(dtype)
    lengths = {name: x.to(device) for name, x in layout.lengths().items()}
    lists: list[torch.Tensor] = []
    on_kernels = pooled_selection.select_by_pooled_keys

    def chosen(*args) -> torch.Tensor:
        lists.append(on_kernels(*args))
        return lists[-1]

    def run(backend: str, wide: torch.dtype) -> list[torch.Tensor]:
        inputs = [x.to(wide, copy=True).requires_grad_() for x in tensors]
        out = infllm_v2.infllm_v2_attention(*inputs, config, **lengths, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, inputs, d_out.to(wide))]

    with patch.object(pooled_selection, "select_by_pooled_keys", chosen):
        found = run("triton", dtype)
    with patch.object(infllm_v2, "select_by_pooled_keys", lambda *args, **kwargs: lists[0]):
        plain, truth = run("torch", dtype), run("torch", torch.float64)
    for name, x, by_torch, exact in zip(("out", "dq", "dk", "dv"), found, plain, truth, strict=True):
        assert_close_to_fp64(x, by_torch, exact, name, largest_score=16.0)
    if lists:
        check_choice(lists[0], layout, config, *tensors[:2])


def check_choice(lists: torch.Tensor, layout: Layout, config: InfLLMv2Config, q: torch.Tensor, k: torch.Tensor) -> None:
    """By scores where a query had to choose; the very blocks where it reads everything."""
    sequences, s = layout.sequences(), layout.s
    # As the kernels got them: rounded to the keys' dtype.
    k_pool = compress(k, phi_mean, config.blocks, sequences=sequences)
    plain, exact = (
        pooled_scores(x, y, config, num_keys=s, sequences=sequences).cpu()
        for x, y in ((q, k_pool), (q.double(), k_pool.double()))
    )
    by_ops = select_by_pooled_keys(q, k_pool, config, num_keys=s, sequences=sequences).cpu()
    positions, lists = layout.positions(config.blocks), lists.cpu()
    assert lists.shape[-1] == config.list_width(s)
    everything = positions < config.sees_all
    assert torch.equal(lists[everything], by_ops[everything])
    n = config.blocks.num_selected_blocks
    assert (lists[~everything][..., n:] == -1).all()
    # What read everything had nothing to choose: as padding, which selects nothing.
    lists = lists.masked_fill(everything[..., None, None], -1)[..., :n]
    positions = positions.masked_fill(everything, -1)
    assert_same_selection(lists, exact.double(), positions, config.blocks, plain_scores=plain)
