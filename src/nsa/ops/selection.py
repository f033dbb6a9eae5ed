"""Which raw blocks each query reads: the importance of a block (eqs. 8-10) and the top n of them (eq. 11).

No gradient flows through the selection.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from nsa.config import NSAConfig
from nsa.ops.compressed_attention import causal_tiles, compressed_stream, parts_of
from nsa.ops.tiled_attention import tiled_attention
from nsa.ops.tiles import Tile, accumulation_dtype
from nsa.shapes import UNIFORM, Sequences, bind
from nsa.streams import Stream

# Queries that share the operations of the choice.
QUERIES_TO_CHOOSE_FOR = 256


def compressed_attention_and_selection(
    q: Float[Tensor, "b t h d"],
    k_cmp: Float[Tensor, "b c g d"],
    v_cmp: Float[Tensor, "b c g e"],
    config: NSAConfig,
    *,
    num_keys: int | None = None,
    sequences: Sequences = UNIFORM,
    scale: float | None = None,
) -> tuple[Float[Tensor, "b t h e"], Float[Tensor, "b t h"], Int[Tensor, "b t g n"]]:
    """`compressed_attention` and the selection it implies, in one pass over the compressed keys.

    The probabilities of eq. 8 are those of the compressed branch; while they are at hand, each query's are summed
    into block scores (eqs. 9, 10) and the top n blocks (eq. 11) kept.

    Args, Raises: those of `compressed_attention`.

    Returns:
        out, lse: those of `compressed_attention`.
        block_indices: int32, ascending, no repeats, -1 last; all -1 for padding. Forced are the first
            `num_initial_blocks` and the last `num_local_blocks` up to the query's own; a block after it is never
            selected; of equal scores the lower index wins, as they are computed: scores that are equal in exact
            arithmetic may be computed a rounding apart. A score that is NaN counts as 0.

    Source: paper eqs. 8-11. Tested against the fp64 brute force of nsa.testing, by scores.
    """
    op = "compressed_attention_and_selection"
    bind(op, q=(q, "b t h d"), k_cmp=(k_cmp, "b c g d"), v_cmp=(v_cmp, "b c g e"))
    return attend_and_select(q, compressed_stream(k_cmp, v_cmp, config, sequences, num_keys), config, scale=scale)


def attend_and_select(
    q: Tensor, cmp: Stream, config: NSAConfig, *, scale: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`compressed_attention_and_selection` of a stream."""
    tiles = causal_tiles(q, cmp, op="compressed_attention_and_selection")
    b, t, _, _ = q.shape
    block_indices = q.new_full((b, cmp.k.shape[2], t, config.num_selected_blocks), -1, dtype=torch.int32)
    # A query that sees no compressed block is before position l - 1, so in selection block 0: its whole past.
    for part in parts_of(q, cmp):
        padding = max(0, -part.first_position)
        block_indices[part.rows, :, part.q_start + padding : part.q_start + part.num_queries, 0] = 0

    chooser = _Chooser(block_indices, config)
    out, lse = tiled_attention(q, cmp.k, cmp.v, tiles, scale=scale, observe=chooser.observe)
    chooser.choose()
    return out, lse, block_indices.transpose(1, 2)


def select_blocks(
    q: Float[Tensor, "b t h d"],
    k_cmp: Float[Tensor, "b c g d"],
    config: NSAConfig,
    *,
    num_keys: int | None = None,
    sequences: Sequences = UNIFORM,
    scale: float | None = None,
) -> Int[Tensor, "b t g n"]:
    """The block indices of `compressed_attention_and_selection`, without the attention."""
    no_values = k_cmp[..., :0]
    return compressed_attention_and_selection(
        q, k_cmp, no_values, config, num_keys=num_keys, sequences=sequences, scale=scale
    )[2]


@torch.no_grad()
def block_scores(
    q: Float[Tensor, "b t h d"],
    k_cmp: Float[Tensor, "b c g d"],
    config: NSAConfig,
    *,
    num_keys: int | None = None,
    sequences: Sequences = UNIFORM,
    scale: float | None = None,
) -> Float[Tensor, "b t g blocks"]:
    """The importance of every selection block, for looking at: it holds t * s / l' numbers, the ops never do.

        p_slc[h, j] = sum over m < l'/d, n < l/d of p_cmp[h, (l'/d) (j + 1) - 1 - m - n]      eq. 9, from 0
        score[j]    = sum of p_slc[h, j] over the query heads h of the group                  eq. 10

    In other words: each compressed block's probability, times its overlap with block j in units of d tokens.

    Args, Raises: those of `compressed_attention`.

    Returns:
        Scores, fp32 (fp64 for fp64 inputs); 0 for blocks a query does not see and for padding. The number of
        blocks is that of the longest sequence.

    Source: paper eqs. 8-10. Tested against the overlap of token ranges in nsa.testing.
    """
    op = "block_scores"
    bind(op, q=(q, "b t h d"), k_cmp=(k_cmp, "b c g d"))
    cmp = compressed_stream(k_cmp, k_cmp[..., :0], config, sequences, num_keys)
    tiles = causal_tiles(q, cmp, op=op)
    b, t, _, _ = q.shape
    parts = parts_of(q, cmp)
    longest = max((part.num_keys for part in parts), default=0)
    blocks = config.num_selection_blocks(longest)
    scores = q.new_zeros((b, k_cmp.shape[2], t, blocks), dtype=accumulation_dtype(q.dtype))

    def observe(tile: Tile, p: Tensor, of: Tensor | None) -> None:
        tile_scores = sum_into_blocks(p, config)[..., :blocks]
        known = scores[tile.rows, :, tile.queries, : tile_scores.shape[-1]]
        known.copy_(tile_scores if of is None else tile_scores.where(of.unsqueeze(-1), known))

    tiled_attention(q, cmp.k, cmp.v, tiles, scale=scale, observe=observe)
    return scores.transpose(1, 2)


class _Chooser:
    """Collects the scores of neighbouring tiles until there are enough queries to choose for at once.

    Tiles of a long context hold few queries, and choosing takes a dozen small operations.
    """

    def __init__(self, block_indices: Tensor, config: NSAConfig) -> None:
        self.block_indices, self.config = block_indices, config  # [b, g, t, n], written here
        self.tiles: list[Tile] = []
        self.scores: list[Tensor] = []
        self.of: list[Tensor | None] = []
        self.queries = slice(0, 0)

    def observe(self, tile: Tile, p: Tensor, of: Tensor | None) -> None:
        """What `tiled_attention` shows of a tile, `nsa.ops.tiles.Observer`."""
        assert isinstance(tile.queries, slice)
        if self.tiles and not self._is_next(tile):
            self.choose()
        first = self.queries.start if self.tiles else tile.queries.start
        self.queries = slice(first, tile.queries.stop)
        self.tiles.append(tile)
        self.scores.append(sum_into_blocks(p, self.config))
        self.of.append(of)
        if self.queries.stop - first >= QUERIES_TO_CHOOSE_FOR:
            self.choose()

    def _is_next(self, tile: Tile) -> bool:
        """Whether the tile continues the sequence of those before it."""
        last = self.tiles[-1]
        same = last.rows == tile.rows and _start(last.keys) == _start(tile.keys)
        return same and self.queries.stop == _start(tile.queries)

    def choose(self) -> None:
        if not self.tiles:
            return
        blocks = self.scores[-1].shape[-1]  # later queries see more
        scores = torch.cat([F.pad(x, (0, blocks - x.shape[-1])) for x in self.scores], dim=2)
        positions = torch.cat([tile.positions for tile in self.tiles if tile.positions is not None])
        rows, groups = self.tiles[0].rows, self.tiles[0].groups
        known = self.block_indices[rows, groups, self.queries]
        # Only queries that are looked at again have scores that are NaN, which topk would prefer to forced blocks.
        found = top_blocks(scores if self.of[0] is None else scores.nan_to_num(0.0), positions, self.config)
        of = [x for x in self.of if x is not None]  # all tiles of a pass alike
        if of:
            found = found.where(torch.cat(of, dim=2).unsqueeze(-1), known)
        known.copy_(found)
        self.tiles, self.scores, self.of = [], [], []


def _start(run: slice | Tensor) -> int | None:
    return run.start if isinstance(run, slice) else None


def sum_into_blocks(p: Tensor, config: NSAConfig) -> Tensor:
    """Probabilities [..., c] of compressed blocks to scores [..., blocks] of the selection blocks they touch."""
    per_compressed = config.compress_block_size // config.compress_stride  # strides in a compressed block, l/d
    per_selected = config.select_block_size // config.compress_stride  # strides in a selection block, l'/d
    c = p.shape[-1]
    blocks = -(-(c + per_compressed - 1) // per_selected)
    # Compressed block i lies on the strides i .. i + l/d - 1, and l'/d strides make a selection block.
    strides = F.pad(p, (0, blocks * per_selected - c))
    for shift in range(1, per_compressed):
        strides[..., shift : shift + c] += p
    scores = strides[..., ::per_selected].clone()
    for stride in range(1, per_selected):  # a sum over so short a last dimension is slow
        scores += strides[..., stride::per_selected]
    return scores


def top_blocks(scores: Tensor, positions: Tensor, config: NSAConfig) -> Tensor:
    """The n best blocks [..., queries, n] of scores [..., queries, blocks], forced ones first, ascending, -1 last."""
    own = (positions // config.select_block_size)[:, None]
    num_blocks = int(own[-1]) + 1
    n = config.num_selected_blocks
    scores = F.pad(scores, (0, max(0, num_blocks - scores.shape[-1])))[..., :num_blocks]
    block = torch.arange(num_blocks, device=scores.device)
    forced = (block < config.num_initial_blocks) | (block > own - config.num_local_blocks)
    scores = scores.masked_fill(forced, torch.inf).masked_fill(block > own, -torch.inf)
    if num_blocks <= n:
        chosen = torch.where(block <= own, block, num_blocks).expand(scores.shape)
        chosen = F.pad(chosen, (0, n - num_blocks), value=num_blocks)
    else:
        best, chosen = scores.topk(min(n + 1, num_blocks), sorted=True)
        # topk breaks ties as it likes. Only a tie between the last block in and the first block out can change
        # the set; those rare rows are sorted again, the lower index first.
        tied = (best[..., n - 1] == best[..., n]) & (best[..., n] > -torch.inf)
        chosen = chosen[..., :n]
        if tied.any():
            chosen[tied] = scores[tied].sort(dim=-1, descending=True, stable=True).indices[..., :n]
        chosen = torch.where(chosen <= own, chosen, num_blocks)
    chosen = chosen.sort(dim=-1).values
    return chosen.masked_fill(chosen == num_blocks, -1).to(torch.int32)
