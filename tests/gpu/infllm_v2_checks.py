"""InfLLM-V2 on the kernels against fp64, PyTorch's operations for the budget; on a GPU and in the interpreter."""

from unittest.mock import patch

import torch
from layouts import Layout

from nsa.config import InfLLMv2Config
from nsa.methods import infllm_v2
from nsa.testing import assert_close_to_fp64


def check(
    layout: Layout, config: InfLLMv2Config, dtype: torch.dtype, device: str, *, h: int, g: int, d: int, e: int
) -> None:
    """Output and gradients on the kernels. fp64 reads the blocks that low precision chose: ties may fall either way."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = ((layout.b, layout.t, h, d), (layout.b, layout.s, g, d), (layout.b, layout.s, g, e))
    tensors = [torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes]
    d_out = torch.randn(layout.b, layout.t, h, e, generator=generator, device=device).to(dtype)
    lengths = {name: x.to(device) for name, x in layout.lengths().items()}
    lists: list[torch.Tensor] = []
    choose = infllm_v2.select_by_pooled_keys

    def chosen(*args, **kwargs) -> torch.Tensor:
        lists.append(choose(*args, **kwargs))
        return lists[-1]

    def run(backend: str, wide: torch.dtype) -> list[torch.Tensor]:
        inputs = [x.to(wide, copy=True).requires_grad_() for x in tensors]
        out = infllm_v2.infllm_v2_attention(*inputs, config, **lengths, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, inputs, d_out.to(wide))]

    with patch.object(infllm_v2, "select_by_pooled_keys", chosen):
        plain, found = run("torch", dtype), run("triton", dtype)
    assert all(torch.equal(one, lists[0]) for one in lists)
    with patch.object(infllm_v2, "select_by_pooled_keys", lambda *args, **kwargs: lists[0]):
        truth = run("torch", torch.float64)
    for name, x, by_torch, exact in zip(("out", "dq", "dk", "dv"), found, plain, truth, strict=True):
        assert_close_to_fp64(x, by_torch, exact, name, largest_score=16.0)
