"""Compiles every kernel for a GPU that is not there, from the launchers themselves; `test_compile.py` runs it.

    python compile_all.py ARCHITECTURE DTYPE HEADS KV_HEADS D E [--training | --infllm-v2]
        ->  one line of JSON for each kernel

The launchers get tensors without memory. What would launch a kernel compiles it instead, for the target and for
integers and pointers as they would be on the device.
"""

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import JITFunction

from nsa.cache_tensors import CacheTensors
from nsa.config import InfLLMv2Config, NSAConfig
from nsa.decode_step import DecodeStep
from nsa.kernels import decode, launch, rotary, rows, selected_gradients, step_begin
from nsa.kernels import step as steps
from nsa.kernels.contiguous_backward import contiguous_backward
from nsa.kernels.contiguous_forward import contiguous_forward
from nsa.kernels.layout import Layout
from nsa.kernels.selected_forward import selected_forward
from nsa.kernels.selection import select_top_blocks
from nsa.kernels.split_sums import sum_splits

# Bytes of shared memory that a program may take: A100, L4 and 4090, H100 and H200, B200.
SHARED = {80: 166912, 89: 101376, 90: 232448, 100: 232448}
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"


def compile_instead(architecture: int) -> None:
    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {
            name: kwargs.pop(name) for name in ("num_warps", "num_stages", "maxnreg", "launch_pdl") if name in kwargs
        }
        values = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        signature, constants, attributes = {}, {}, {}
        for i, parameter in enumerate(self.params):
            value, name = values[parameter.name], parameter.name
            if parameter.is_constexpr:
                signature[name], constants[(i,)] = "constexpr", value
            else:
                special = not parameter.do_not_specialize
                signature[name] = signature_of(value, (i,), special, constants, attributes)
        language = GluonASTSource if isinstance(self, GluonJITFunction) else ASTSource
        source = language(fn=self, signature=signature, constexprs=constants, attrs=attributes)
        name = self.fn.__name__ + (" with parts" if values.get("PARTS") is True else "")
        name += " over tables" if values.get("PAGED") is True else ""
        report(name, triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options))

    JITFunction.run = run


def signature_of(value: Any, path: tuple[int, ...], special: bool, constants: dict, attributes: dict) -> Any:
    """Of an argument, or of those in a tuple; and what is known of the one at this path."""
    if isinstance(value, tuple):
        return tuple(signature_of(x, (*path, i), special, constants, attributes) for i, x in enumerate(value))
    specialized = isinstance(value, int) and special
    if value is None or (specialized and value == 1):
        constants[path] = value
        return "constexpr"
    if isinstance(value, torch.Tensor) or (specialized and value % 16 == 0):
        attributes[path] = [["tt.divisibility", 16]]
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    if isinstance(value, TensorDescriptor):
        kind = TYPES[value.base.dtype].removeprefix("*")
        return f"tensordesc<{kind}{list(value.block_shape)},{value.layout!r}>"
    if isinstance(value, float):
        return "fp32"
    return "i32" if abs(value) < 2**31 else "i64"


def report(name: str, kernel: Any) -> None:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    ptx = kernel.asm["ptx"]
    found = {
        "kernel": name,
        "shared": kernel.metadata.shared,
        "registers": int(registers),
        "stack": int(stack),
        "wgmma": len(re.findall(r"wgmma\.mma_async", ptx)),
        "tcgen05": len(re.findall(r"tcgen05\.mma", ptx)),
        "mma": len(re.findall(r"mma\.sync", ptx)),
    }
    print(json.dumps(found), flush=True)


def launch_all(dtype: torch.dtype, h: int, g: int, d: int, e: int, t: int = 4096) -> None:
    """Every kernel once, the contiguous ones in their fullest form (with a window) where Hopper has no kernel."""
    config = NSAConfig()

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k, v, d_out = tensor(1, t, h, d), tensor(1, t, g, d), tensor(1, t, g, e), tensor(1, t, h, e)
    lse, gates = tensor(1, t, h, dtype=torch.float32), tensor(1, t, h, 3)
    num_compressed = config.num_compressed_blocks(t)
    k_cmp, v_cmp = tensor(1, num_compressed, g, d), tensor(1, num_compressed, g, e)
    block_indices = tensor(1, t, g, config.num_selected_blocks, dtype=torch.int32)
    raw = Layout(1, t, t)
    compressed = Layout(1, t, t, config.compress_block_size, config.compress_stride)
    window, scale = config.window_size, 0.1
    contiguous_forward(q, k_cmp, v_cmp, compressed, None, scale)
    contiguous_forward(q, k, v, raw, window, scale)
    contiguous_backward(q, k, v, d_out, lse, lse, raw, window, scale)
    parts = (tensor(16, *x.shape, dtype=torch.float32) for x in (k_cmp, v_cmp))
    sum_splits(*parts, k_cmp, v_cmp)
    Layout(1, t, t, cu_seqlens_q=tensor(4, dtype=torch.int32)).query_tiles(4)
    select_top_blocks(q, k_cmp, lse, compressed, config, scale)
    selected_forward(q, k, v, block_indices, raw, config, scale)
    selected_forward(q[:, :, : 4 * g], k, v, block_indices, raw, config, scale)  # groups of four heads
    selected_gradients.selected_gradients(q, k, v, block_indices, d_out, lse, lse, raw, config, scale)
    few = (q[:, :, : 4 * g], k, v, block_indices, d_out[:, :, : 4 * g], lse[:, :, : 4 * g], lse[:, :, : 4 * g])
    selected_gradients.selected_gradients(*few, raw, config, scale)
    rows.combine(d_out, d_out, d_out, gates)
    rows.signed_by_gate(d_out, gates, 0)
    rows.gates_backward((d_out,) * 3, (lse,) * 3, gates, d_out)
    rows.rowsum_delta(d_out, d_out, lse)
    rotary.rotate(q, tensor(1, t, d), tensor(1, t, d))


def launch_infllm_v2(dtype: torch.dtype, h: int, g: int, d: int, e: int, t: int = 16384) -> None:
    """The choice and the attention of MiniCPM4's sizes, whose lists have 128 slots."""
    config = InfLLMv2Config()

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k, v, d_out = tensor(1, t, h, d), tensor(1, t, g, d), tensor(1, t, g, e), tensor(1, t, h, e)
    lse, k_pool = tensor(1, t, h, dtype=torch.float32), tensor(1, config.blocks.num_compressed_blocks(t), g, d)
    lists = tensor(1, t, g, config.list_width(t), dtype=torch.int32)
    raw, pooled = Layout(1, t, t), Layout(1, t, t, config.kernel_size, config.kernel_stride)
    contiguous_forward(q, k_pool, k_pool[..., :8], pooled, None, 0.1)
    select_top_blocks(q, k_pool, lse, pooled, config.blocks, 0.1, by_max=True)
    selected_forward(q, k, v, lists, raw, config.blocks, 0.1)
    selected_gradients.selected_gradients(q, k, v, lists, d_out, lse, lse, raw, config.blocks, 0.1)


def launch_decoding(dtype: torch.dtype, h: int, g: int, d: int, e: int) -> None:
    """A step over pages, each of whose kernels is in its fullest form there."""
    config, b, t, pages, page_size = NSAConfig(), 4, 1, 64, 256

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def pair(first: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        return tensor(first, g, tokens, d).transpose(1, 2), tensor(first, g, tokens, e).transpose(1, 2)

    def phi(width: int) -> list[torch.Tensor]:
        block = config.compress_block_size
        sizes = ((block, width), (2 * width, block * width), (2 * width,), (width, 2 * width), (width,))
        return [tensor(*size) for size in sizes]

    tensors = CacheTensors(
        *pair(b * pages, page_size), *pair(b * pages, page_size // config.compress_stride),
        *pair(b, 640), *pair(b, 128), tensor(b, pages, dtype=torch.int32), tensor(b, dtype=torch.int32),
        tensor(b, g, 16, dtype=torch.int32),
    )  # fmt: skip
    counts, factors = tensor(b, dtype=torch.int32), tensor(b, t, d)
    new, step = [tensor(b, t, g, width) for width in (d, e, d, e, d, e)], DecodeStep(counts, *[factors] * 4)
    decode.attend(tensor(b, t, h, d), tensor(b, t, h, 3), tensors, config, 0.1, counts, factors, factors)
    decode.append(tensors, new, config, "mlp", (phi(d), phi(e)), step)
    tables = replace(tensors, window_table=tensors.block_table, raw_table=tensors.block_table)
    decode.append(tables, new, config, "mlp", (phi(d), phi(e)), step)
    weight = tensor(4 * h * d, h * d)
    ids, frequencies = tensor(b, t, dtype=torch.int64), tensor(d // 2, dtype=torch.float32)
    step_begin.begin(ids, tensor(32000, h * d), counts, counts, frequencies, 1.0, config)
    steps.rms_norm(tensor(b, h * d), tensor(h * d), 1e-5)
    steps.project(tensor(4 * b, h * d), weight, up=weight)


if __name__ == "__main__":
    architecture, dtype, *sizes = (x for x in sys.argv[1:] if not x.startswith("--"))
    only_training = "--training" in sys.argv
    launch.shared_memory = lambda device: SHARED[int(architecture)]
    launch.is_hopper = lambda device: architecture == "90"
    compile_instead(int(architecture))
    selected_gradients.PARTS_BYTES = 48 << 20  # in pieces
    if "--infllm-v2" in sys.argv:
        launch_infllm_v2(getattr(torch, dtype), *map(int, sizes))
        sys.exit()
    launch_all(getattr(torch, dtype), *map(int, sizes))
    if not only_training:
        launch_decoding(getattr(torch, dtype), *map(int, sizes))
