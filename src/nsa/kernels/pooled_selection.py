"""The choice of InfLLM-V2 on kernels: log-sum-exp, scores and top n are NSA's, blocks scored by their largest key.

Nothing reads a length on the host. Queries that read everything get their lists from their positions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa.config import InfLLMv2Config
from nsa.kernels.attention import on_device
from nsa.kernels.contiguous_forward import contiguous_forward
from nsa.kernels.launch import as_rows
from nsa.kernels.layout import Layout
from nsa.kernels.selection import select_top_blocks
from nsa.shapes import Sequences

# The narrowest values that the kernels take: pooled keys have none.
NO_VALUES = 8


@torch.no_grad()
def select_by_pooled_keys(
    q: Tensor, k_pool: Tensor, where: Sequences, config: InfLLMv2Config, num_keys: int, scale: float
) -> Tensor:
    """`nsa.ops.pooled_selection.select_by_pooled_keys`, without coarse_lse."""
    q, k_pool = as_rows(q.detach()), as_rows(k_pool.detach())
    sizes = (*q.shape[:2], num_keys, config.kernel_size, config.kernel_stride)
    layout = Layout(*sizes, *on_device(where, q.device))
    width = config.list_width(num_keys)
    with torch.cuda.device_of(q):
        _, lse = contiguous_forward(q, k_pool, as_rows(k_pool[..., :NO_VALUES]), layout, None, scale)
        chosen = select_top_blocks(q, k_pool, lse, layout, config.blocks, scale, by_max=True)
        position = positions(layout, q.device)
        slots = torch.arange(width, device=q.device, dtype=torch.int32)
        every = slots.where(slots <= position.div(config.block_size, rounding_mode="floor")[..., None], -1)
        reads_all = (position < config.sees_all)[..., None, None]
        return torch.where(reads_all, every.unsqueeze(2), F.pad(chosen, (0, width - chosen.shape[-1]), value=-1))


def positions(layout: Layout, device: torch.device) -> Tensor:
    """Of every query in its own sequence, int32 [b or 1, t]; negative for padding."""
    column = torch.arange(layout.t, device=device, dtype=torch.int32)
    if layout.cu_q is not None and layout.cu_k is not None:
        sequence = torch.searchsorted(layout.cu_q, column, right=True) - 1
        sequence = sequence.clamp(0, max(len(layout.cu_q) - 2, 0))
        return (column - layout.cu_q[sequence + 1] + layout.cu_k.diff()[sequence])[None]
    last = torch.full((1,), layout.s, device=device, dtype=torch.int32) if layout.lengths is None else layout.lengths
    return last[:, None] - layout.t + column
