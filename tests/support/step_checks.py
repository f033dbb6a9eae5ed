"""The kernels of `nsa.ops.step` against fp64, within the budget that plain PyTorch sets; interpreter and GPU."""

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from nsa.config import NSAConfig
from nsa.kernels import step as kernels
from nsa.kernels.step_begin import begin
from nsa.models import NSALlamaConfig
from nsa.modules.attention import DecodeStep
from nsa.ops import step as ops
from nsa.testing import assert_close_to_fp64

# What stands behind the products of a decoder layer, and nothing.
USES = {
    "alone": (),
    "inputs": ("bias", "sigmoid_from"),
    "mlp": ("up",),
    "output": ("add",),
    "output with bias": ("bias", "add"),
}


def check_project(rows: int, width: int, columns: int, use: str, dtype: torch.dtype, device: str) -> None:
    shapes = {"x": (rows, width), "weight": (columns, width), "bias": (columns,), "up": (columns, width)}
    shapes["add"] = (rows, columns)
    given = {
        name: (torch.randn(shapes[name], device=device) * (width**-0.5 if name in ("weight", "up") else 1)).to(dtype)
        for name in ("x", "weight", *USES[use])
        if name in shapes
    }
    if "sigmoid_from" in USES[use]:
        given["sigmoid_from"] = columns // 2
    wide = {name: x.double() if isinstance(x, Tensor) else x for name, x in given.items()}
    found = kernels.project(**{**given, "x": apart(given["x"])})
    assert_close_to_fp64(found, ops.project(**given), ops.project(**wide), f"{use}, {rows} rows")
    assert torch.equal(found, kernels.project(**given))


def check_rms_norm(rows: int, width: int, dtype: torch.dtype, device: str) -> None:
    x, weight = (torch.randn(rows, width, device=device) * 30).to(dtype), torch.randn(width, device=device).to(dtype)
    found, plain = kernels.rms_norm(apart(x), weight, 1e-2), ops.rms_norm(x, weight, 1e-2)
    assert_close_to_fp64(found, plain, ops.rms_norm(x.double(), weight.double(), 1e-2), f"{rows} rows of {width}")


def check_begin(lengths: tuple[int, ...], t: int, counts: tuple[int, ...] | None, dtype: torch.dtype, device: str):
    """Against the definition: angles p f at position p; a block that ends with stride c begins at (c + 1) d - l."""
    scaled = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 1 << 15}
    rotary = LlamaRotaryEmbedding(NSALlamaConfig(head_dim=24, rope_parameters=scaled)).to(device)
    config = NSAConfig(compress_block_size=8, compress_stride=4, select_block_size=8)
    table, ids = torch.randn(50, 48, device=device).to(dtype), torch.randint(50, (len(lengths), t), device=device)
    on_device = torch.tensor(lengths, dtype=torch.int32, device=device)
    given = None if counts is None else torch.tensor(counts, dtype=torch.int32, device=device)
    embeds, *found = begin(ids, table, on_device, given, rotary.inv_freq, rotary.attention_scaling, config)
    assert torch.equal(embeds, table[ids])

    new = [t] * len(lengths) if counts is None else counts
    tokens = [[length + n - t + i for i in range(t)] for length, n in zip(lengths, new, strict=True)]
    blocks = [[(length // 4 + i + 1) * 4 - 8 for i in range(-(-t // 4))] for length in lengths]
    step = DecodeStep.after(on_device, t, given, config, rotary, embeds)
    plain = [step.cos, step.sin, step.cos_cmp, step.sin_cmp]
    for i, (name, position) in enumerate(
        (("tokens", tokens), ("tokens", tokens), ("blocks", blocks), ("blocks", blocks))
    ):
        angle = torch.tensor(position, device=device).clamp(min=0).double()[..., None] * rotary.inv_freq.double()
        truth = (angle.cos(), angle.sin())[i % 2].repeat(1, 1, 2) * rotary.attention_scaling
        assert_close_to_fp64(found[i], plain[i], truth, f"{name}, {('cos', 'sin')[i % 2]}")


def apart(x: Tensor) -> Tensor:
    """x as columns of a larger matrix, the others NaN."""
    larger = torch.full((len(x), x.shape[1] + 16), torch.nan, dtype=x.dtype, device=x.device)
    larger[:, : x.shape[1]] = x
    return larger[:, : x.shape[1]]
