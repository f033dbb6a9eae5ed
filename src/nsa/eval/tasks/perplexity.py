"""How well is held-out text predicted, by how much of it has been seen? Loss in buckets of the position.

A model that uses its whole context predicts the later tokens of a long text better than the earlier ones; a
window-only model stops improving where its (stacked) window ends.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import nn

from nsa.eval.scoring import TOKENS_PER_BATCH, token_losses
from nsa.eval.tasks.task import Advance, Row, ignore
from nsa.eval.text import held_out_documents


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Mean loss in nats per token over `samples` sequences of `length` tokens of held-out text.

    The sequences lie evenly in the text and never cross a document. One row for all positions, one a bucket:
    [1, 64), [64, 128), [128, 256), ... The first token has no context and is not predicted. The interval is over
    sequences, not tokens, for the tokens of one sequence are not independent.

    Args:
        length: tokens a sequence.
        samples: sequences.
        first_bucket: the first bucket's end; each further one ends at twice the end of the one before.
        text: a source of held-out text (nsa.eval.text).
    """

    name: ClassVar[str] = "perplexity"

    length: int = 1024
    samples: int = 32
    first_bucket: int = 64
    text: str = "python"

    def __post_init__(self) -> None:
        if self.length < 2:
            raise ValueError(f"perplexity: length must be at least 2 tokens, got {self.length}")
        if self.samples < 1 or self.first_bucket < 1:
            got = f"{self.samples} and {self.first_bucket}"
            raise ValueError(f"perplexity: samples and first_bucket must be positive, got {got}")

    def buckets(self) -> list[tuple[int, int]]:
        """Positions [first, last) of the predicted tokens, doubling."""
        edges = [1]
        while edges[-1] < self.length:
            edges.append(min(self.length, self.first_bucket if len(edges) == 1 else 2 * edges[-1]))
        return [(first, last) for first, last in pairwise(edges) if first < last]

    def sequences(self, tokenizer: Any) -> torch.Tensor:
        """[samples, length] token ids, the same for every model with this tokenizer."""
        windows = [
            document[start : start + self.length]
            for document in held_out_documents(self.text, tokenizer)
            for start in range(0, len(document) - self.length + 1, self.length)
        ]
        if len(windows) < self.samples:
            raise ValueError(
                f"perplexity: expected {self.samples} sequences of {self.length} tokens, each inside one document; "
                f"the text holds {len(windows)}"
            )
        return torch.tensor([windows[i * len(windows) // self.samples] for i in range(self.samples)])

    def num_steps(self, tokenizer: Any) -> int:
        return self.samples

    def run(self, model: nn.Module, tokenizer: Any, advance: Advance = ignore) -> list[Row]:
        step = max(1, TOKENS_PER_BATCH // self.length)
        parts = []
        for batch in self.sequences(tokenizer).split(step):
            parts.append(token_losses(model, batch))
            advance(len(batch))
        losses = torch.cat(parts).double()  # losses[:, i] is that of the token at position i + 1
        rows = [Row.of_losses(self.name, {"length": self.length, "positions": "all"}, losses.mean(dim=1).tolist())]
        for first, last in self.buckets():
            bucket = losses[:, first - 1 : last - 1].mean(dim=1).tolist()
            rows.append(Row.of_losses(self.name, {"length": self.length, "positions": [first, last]}, bucket))
        return rows
