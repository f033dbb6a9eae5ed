"""How well is the end of a long text predicted, token by token, as in generation?"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from nsa.eval.scoring import TOKENS_PER_BATCH, token_losses
from nsa.eval.tasks.perplexity import Perplexity
from nsa.eval.tasks.task import Advance, Row, ignore


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """Mean loss in nats per token over the last `decode` tokens of each sequence; one row.

    All before them is one prefill, and each of them one decode step: what a method that is sparse in decode only
    loses, which perplexity (one prefill) cannot show. The sequences are those of perplexity.

    Args:
        length: tokens a sequence.
        decode: tokens predicted, by so many steps.
        samples: sequences.
        text: a source of held-out text (nsa.eval.text).
    """

    name: ClassVar[str] = "continuation"

    length: int = 1024
    decode: int = 64
    samples: int = 32
    text: str = "python"

    def __post_init__(self) -> None:
        if not 1 <= self.decode <= self.length - 2:
            raise ValueError(f"continuation: expected decode from 1 to {self.length - 2}, got {self.decode}")
        if self.samples < 1:
            raise ValueError(f"continuation: samples must be positive, got {self.samples}")

    def num_steps(self, tokenizer: Any) -> int:
        return self.samples

    def run(self, model: nn.Module, tokenizer: Any, advance: Advance = ignore) -> list[Row]:
        sequences = Perplexity(length=self.length, samples=self.samples, text=self.text).sequences(tokenizer)
        parts = []
        for batch in sequences.split(max(1, TOKENS_PER_BATCH // self.length)):
            parts.append(token_losses(model, batch, last=self.decode, decode=self.decode))
            advance(len(batch))
        losses = torch.cat(parts).double().mean(dim=1).tolist()
        where = {"length": self.length, "positions": [self.length - self.decode, self.length]}
        return [Row.of_losses(self.name, where, losses)]
