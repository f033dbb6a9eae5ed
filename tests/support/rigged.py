"""Models whose scores are known beforehand, and held-out text: what the evaluation is tested on."""

import random
import re
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

ASKED = re.compile(r"f\((\w+)=(\w*)$")


def write_text(folder: Path) -> str:
    """Two documents of plausible lines, about 20,000 characters; returns their folder as the tasks want it."""
    rng = random.Random(0)
    words = ["value", "result", "item", "index", "count", "total", "buffer", "stream", "offset"]
    folder.mkdir()
    for name in ("first.txt", "second.txt"):
        lines = [" ".join(rng.choices(words, k=rng.randrange(2, 9))) for _ in range(300)]
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder)


class Rigged(nn.Module):
    """Says what `answer(name, definitions)` returns when asked for a name, letter by letter; else a space."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(model_type="rigged", num_hidden_layers=1, vocab_size=len(tokenizer))

    def answer(self, name: str, definitions: dict[str, str]) -> str:
        raise AssertionError("a rigged model says what it answers")

    def forward(self, input_ids: Tensor, use_cache: bool, logits_to_keep: int) -> SimpleNamespace:
        assert not use_cache
        b, t = input_ids.shape
        logits = torch.zeros(b, logits_to_keep, len(self.tokenizer))
        for row in range(b):
            for place in range(logits_to_keep):
                text = self.tokenizer.decode(input_ids[row, : t - logits_to_keep + place + 1])
                logits[row, place, self.next_token(text)] = 1.0
        return SimpleNamespace(logits=logits)

    def next_token(self, text: str) -> int:
        asked = ASKED.search(text)
        letter = " "
        if asked is not None:
            name, said = asked.groups()
            value = self.answer(name, dict(re.findall(r"^([A-Z]+)=(\w+)$", text, re.MULTILINE)))
            letter = value[len(said)] if value.startswith(said) and len(said) < len(value) else " "
        return self.tokenizer(letter)["input_ids"][0]


class Lookup(Rigged):
    """Finds every value, through any number of aliases."""

    def answer(self, name: str, definitions: dict[str, str]) -> str:
        while name in definitions:
            name = definitions[name]
        return name


class Picker(Rigged):
    """Sees the values but not whose they are: names one of them at random, the same for the same text."""

    def answer(self, name: str, definitions: dict[str, str]) -> str:
        values = [value for value in definitions.values() if value not in definitions]
        return random.Random(" ".join([name, *values])).choice(values)


class Uniform(Rigged):
    """Gives every token the same probability, so that the first one wins."""

    def forward(self, input_ids: Tensor, use_cache: bool, logits_to_keep: int) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.zeros(len(input_ids), logits_to_keep, len(self.tokenizer)))
