"""What is timed: NSA by its public function, and dense attention as PyTorch offers it, on the same q, k, v."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nsa.config import NSAConfig
from nsa.costs.flops import Shape
from nsa.functional import native_sparse_attention
from nsa.kernels.library import whole
from nsa.ops.compress import compress, phi_mean

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# Past this a mask of selected blocks keeps FlexAttention busy for seconds.
MAX_FLEX_SELECTED = 32768
FLEX_BLOCK = 128  # FlexAttention's tiles


@dataclass(frozen=True)
class Candidate:
    """A function without arguments, and what it is differentiated by."""

    forward: Callable[[], Tensor]
    inputs: tuple[Tensor, ...]
    d_out: Tensor

    def backward(self, out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, self.inputs, self.d_out, retain_graph=True)

    def both(self) -> None:
        torch.autograd.grad(self.forward(), self.inputs, self.d_out)


class Problem:
    """Random q, k, v and gates of one sequence, with keys and values of its own for every branch.

    Correlated: queries resemble their neighbours, AR(1) with .95. What the selected branch gains from sharing blocks
    between neighbours depends on that; `distinct_of_four` says how much there is to share.
    """

    def __init__(
        self, shape: Shape, config: NSAConfig, *, correlated: bool, dtype: torch.dtype, device: str = "cuda"
    ) -> None:
        self.shape, self.config, self.device = shape, config, device
        generator = torch.Generator(device).manual_seed(0)
        length, h, g, d, e = shape.length, shape.h, shape.g, shape.d, shape.e

        def normal(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator, device=device, dtype=dtype)

        q = normal(1, length, h, d)
        self.q = (autoregressive(q, 0.95) if correlated else q).requires_grad_()
        k, v, k_win, v_win = (normal(1, length, g, x).requires_grad_() for x in (d, e, d, e))
        self.slc, self.win = (k, v), (k_win, v_win)
        # The mean of l independent keys is short; a trained phi gives keys as long as others.
        longer = config.compress_block_size**0.5
        k_cmp, v_cmp = ((compress(x.detach(), phi_mean, config) * longer).contiguous().requires_grad_() for x in (k, v))
        self.cmp = (k_cmp, v_cmp)
        self.gates = normal(1, length, h, 3).sigmoid().requires_grad_()
        self.d_out = normal(1, length, h, e)

    def nsa(self) -> Candidate:
        (k_cmp, v_cmp), (k, v), (k_win, v_win) = self.cmp, self.slc, self.win

        def forward() -> Tensor:
            return native_sparse_attention(
                self.q, k, v, self.gates, self.config, k_cmp=k_cmp, v_cmp=v_cmp, k_win=k_win, v_win=v_win,
                nonnegative_gates=True, backend="triton",
            )  # fmt: skip

        return Candidate(forward, (self.q, *self.cmp, *self.slc, *self.win, self.gates), self.d_out)

    @torch.no_grad()
    def block_indices(self) -> Tensor:
        keys, scale = [*self.cmp, *self.slc, *self.win], self.shape.d**-0.5
        return whole(self.q, keys, self.gates, [None] * 4, self.config.sizes, scale, True, 0)[7]

    def distinct_of_four(self) -> float:
        """U4: blocks that four neighbouring queries select between them, on average."""
        picks = self.block_indices()
        _, t, _, n = picks.shape
        fours = picks[:, : t // 4 * 4].unflatten(1, (-1, 4)).transpose(2, 3).reshape(-1, 4 * n).sort(-1).values
        new = (fours[:, 1:] != fours[:, :-1]) & (fours[:, 1:] >= 0)
        return float((new.sum(-1) + (fours[:, 0] >= 0)).float().mean())

    def heads_first(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v, dO as [1, heads, length, width]."""
        q, k, v = (x.detach().transpose(1, 2).requires_grad_() for x in (self.q, *self.slc))
        return q, k, v, self.d_out.transpose(1, 2)

    def sdpa(self, backend: SDPBackend) -> Candidate:
        """Dense causal attention. Not every backend shares KV heads, so each query head is given its own."""
        q, k, v, d_out = self.heads_first()
        group = self.shape.h // self.shape.g
        k, v = (x.detach().repeat_interleave(group, 1).requires_grad_() for x in (k, v))

        def forward() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        return Candidate(forward, (q, k, v), d_out)

    def flex(self) -> Candidate:
        """Dense causal FlexAttention, compiled, KV heads shared."""
        from torch.nn.attention.flex_attention import BlockMask

        length, blocks = self.shape.length, self.shape.length // FLEX_BLOCK
        # What create_block_mask would find, without a tensor of length x length: tiles on the diagonal are masked,
        # those before it are visited whole.
        block = torch.arange(blocks, dtype=torch.int32, device=self.device)
        diagonal = block[:, None].expand(1, 1, blocks, blocks).contiguous()
        before = block.expand(1, 1, blocks, blocks).contiguous()
        mask = BlockMask.from_kv_blocks(
            torch.ones_like(block)[None, None], diagonal, block[None, None], before,
            BLOCK_SIZE=FLEX_BLOCK, mask_mod=lambda b, h, i, j: i >= j, seq_lengths=(length, length),
        )  # fmt: skip
        return self._flex(mask)

    def flex_selected(self) -> Candidate:
        """FlexAttention over NSA's selected blocks: one branch of three."""
        from torch.nn.attention.flex_attention import BlockMask

        length, size, group = self.shape.length, self.config.select_block_size, self.shape.h // self.shape.g
        selected = selected_table(self.block_indices(), length, size)

        def chosen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (i >= j) & selected[h // group, i, j // size]

        # A tile of keys is visited by a tile of queries if any of them selected any of its blocks.
        needed = selected.unflatten(1, (-1, FLEX_BLOCK)).any(2).unflatten(2, (-1, FLEX_BLOCK // size)).any(-1)
        needed = needed.repeat_interleave(group, 0)[None]
        order = needed.int().argsort(dim=-1, descending=True, stable=True).int()
        mask = BlockMask.from_kv_blocks(
            needed.sum(-1).int(), order, BLOCK_SIZE=FLEX_BLOCK, mask_mod=chosen, seq_lengths=(length, length)
        )
        return self._flex(mask)

    def _flex(self, mask: "BlockMask") -> Candidate:
        from torch._functorch import config as autograd_config
        from torch.nn.attention.flex_attention import flex_attention

        q, k, v, d_out = (x.detach().contiguous() for x in self.heads_first())
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        autograd_config.donated_buffer = False  # a graph is kept and run again
        compiled = torch.compile(flex_attention, dynamic=False)
        return Candidate(lambda: compiled(q, k, v, block_mask=mask, enable_gqa=True), (q, k, v), d_out)

    def rivals(self) -> dict[str, Callable[[], Candidate]]:
        found = {
            "cuDNN": lambda: self.sdpa(SDPBackend.CUDNN_ATTENTION),
            "FlashAttention-2": lambda: self.sdpa(SDPBackend.FLASH_ATTENTION),
        }
        length = self.shape.length
        if length % FLEX_BLOCK == 0:
            found["FlexAttention"] = self.flex
            if FLEX_BLOCK % self.config.select_block_size == 0 and length <= MAX_FLEX_SELECTED:
                found["FlexAttention, selected branch"] = self.flex_selected
        return found


def selected_table(block_indices: Tensor, length: int, size: int) -> Tensor:
    """bool [g, t, blocks]: whether a query selected a block."""
    blocks = -(-length // size)
    picks = block_indices[0].transpose(0, 1).long()
    table = torch.zeros(*picks.shape[:2], blocks + 1, dtype=torch.bool, device=picks.device)
    return table.scatter_(-1, picks.where(picks >= 0, blocks), True)[..., :blocks].contiguous()


def autoregressive(x: Tensor, coefficient: float, reach: int = 128) -> Tensor:
    """AR(1) along dimension 1 with unit variance, its memory cut at `reach` (0.95^128 = 0.001)."""
    weights = coefficient ** torch.arange(reach - 1, -1, -1, device=x.device) * (1 - coefficient**2) ** 0.5
    b, t, h, d = x.shape
    lines = x.permute(0, 2, 3, 1).reshape(-1, 1, t)
    done = [
        F.conv1d(F.pad(part.float(), (reach - 1, 0)), weights.view(1, 1, -1)).to(x.dtype) for part in lines.split(256)
    ]
    return torch.cat(done).view(b, h, d, t).permute(0, 3, 1, 2).contiguous()
