"""`nsa bench module`: one layer from hidden states to hidden states, beside its dense twin."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from nsa.bench.arguments import ModuleArguments
from nsa.bench.result import Entry
from nsa.bench.timing import interleaved, peak_gib
from nsa.modules.attention import NativeSparseAttention
from nsa.modules.rotary import RotaryEmbedding, rotate
from nsa.modules.token_layout import TokenLayout
from nsa.streams import Stream

# The first that serves: cuDNN's is the faster on Hopper.
DENSE_BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]


class DenseAttention(nn.Module):
    """The dense twin: the projections of one branch, rotary positions, PyTorch's causal attention."""

    def __init__(self, hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)
        self.rotary = RotaryEmbedding(head_dim)

    def forward(self, x: Tensor) -> Tensor:
        cos, sin = self.rotary(x, torch.arange(x.shape[1], device=x.device)[None])
        q = rotate(self.q_proj(x).unflatten(-1, (self.num_heads, -1)), cos, sin)
        k = rotate(self.k_proj(x).unflatten(-1, (self.num_kv_heads, -1)), cos, sin)
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, -1))
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        with sdpa_kernel(DENSE_BACKENDS, set_priority=True):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


def measure(arguments: ModuleArguments, device: str = "cuda") -> Iterator[Entry]:
    """Forward and backward of the layers in bf16; and what phi, the compression, takes of them."""
    sizes = (arguments.hidden_size, arguments.heads, arguments.kv_heads, arguments.head_dim)
    torch.manual_seed(0)
    with torch.device(device):
        nsa, dense = NativeSparseAttention(*sizes).bfloat16(), DenseAttention(*sizes).bfloat16()
    for length in arguments.lengths:
        x = torch.randn(1, length, arguments.hidden_size, device=device, dtype=torch.bfloat16, requires_grad=True)
        d_out = torch.randn_like(x)
        runs = {name: _run(layer, x, d_out) for name, layer in (("NSA", nsa), ("dense", dense))}
        gib = {name: peak_gib(both) for name, (_, both) in runs.items()}
        forward: dict[str, Callable[[], object]] = {name: run for name, (run, _) in runs.items()}
        both: dict[str, Callable[[], object]] = {name: run for name, (_, run) in runs.items()}
        forward["phi"], both["phi"] = _phi(nsa, length, device)
        yield Entry(
            length=length, inputs="random", part="forward", ms=interleaved(forward, arguments.repetitions), gib=gib
        )
        yield Entry(
            length=length, inputs="random", part="forward + backward", ms=interleaved(both, arguments.repetitions)
        )


def _run(layer: nn.Module, x: Tensor, d_out: Tensor) -> tuple[Callable[[], object], Callable[[], object]]:
    parameters = [x, *layer.parameters()]

    def forward() -> Tensor:
        with torch.no_grad():
            return layer(x)

    return forward, lambda: torch.autograd.grad(layer(x), parameters, d_out)


def _phi(layer: NativeSparseAttention, length: int, device: str) -> tuple[Callable[[], object], Callable[[], object]]:
    """Compression of a layer's keys and values alone."""
    size = (1, length, layer.num_kv_heads, layer.head_dim)
    k, v = (torch.randn(size, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    x = torch.empty(1, length, layer.hidden_size, device=device, dtype=torch.bfloat16)
    layout = TokenLayout.of(x, layer.rotary, layer.config)
    parameters = [k, v, *layer.compress_k.parameters(), *layer.compress_v.parameters()]

    def forward() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return layer._compress(Stream(k, v), layout)

    def both() -> object:
        outs = layer._compress(Stream(k, v), layout)
        return torch.autograd.grad(outs, parameters, [torch.ones_like(out) for out in outs])

    return forward, both
