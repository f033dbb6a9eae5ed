"""Training rows: a function of the seed and the number of the step, so that a resumed run reads what it would have.

Two layouts. `rows`: [b, t] tokens, each row from one document (of a document's end, what fills no row is left out;
where a document is cut changes with every pass). `flat`: one row of b * t tokens in which pieces of documents follow
each other, with `position_ids` that start again from 0 at each piece: the field's way (transformers'
DataCollatorWithFlattening), which wastes nothing on short documents. In neither does attention, or a loss, cross
from one document to another.

A packed row says where its documents lie, so that no model has to ask the device: `cu_seq_lens_q`, int32, the first
token of each document and then the row's length, repeated up to a power of two of entries (documents of no tokens, at
least `FEWEST_BOUNDARIES`), and `max_length_q`, an int, the longest document rounded up to a power of two. Both take
few values in a run, and so does the number of shapes that torch.compile meets.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from nsa.training.curriculum import Stage
from nsa.training.documents import Documents
from nsa.training.puzzles.mix import puzzle_row
from nsa.training.retrieval import Encode, Retrieval, repeated_example, retrieval_example

Layout = Literal["rows", "flat"]
IGNORED = -100  # a label that no loss counts
FEWEST_BOUNDARIES = 64


class TrainingBatches(Dataset):
    """Item i is the whole i-th batch: input_ids and labels [b, t], or in the flat layout what `flatten` gives.

    Args:
        documents: the training text.
        stages: the curriculum; `batches_per_step` items make one of its steps.
        batch_tokens: tokens in an item; a row longer than that is an item of its own.
        encode: str -> ids, for retrieval examples.
        filler: text between a definition and its use.
        seed: all randomness.
        layout: "rows" or "flat".
        batches_per_step: items that make one step of the optimizer.
        answer_weight: how much a token of an answer counts in the loss, next to 1 for any other; unless it is 1, items
            have `weights` [b, t] with a mean of 1.
    """

    def __init__(
        self,
        documents: Documents,
        stages: Sequence[Stage],
        batch_tokens: int,
        *,
        encode: Encode,
        filler: str,
        seed: int,
        layout: Layout = "rows",
        batches_per_step: int = 1,
        answer_weight: float = 1.0,
    ) -> None:
        for stage in stages:
            if layout == "rows":
                documents.require(stage.length, "training corpus")
        if len(documents.tokens) < 2:
            raise ValueError(f"the training corpus has {len(documents.tokens)} tokens: nothing to learn from")
        self.documents, self.stages, self.batch_tokens = documents, tuple(stages), batch_tokens
        self.encode, self.filler, self.seed, self.layout = encode, filler, seed, layout
        self.answer_weight = answer_weight
        self.ends = np.cumsum([stage.steps * batches_per_step for stage in stages])
        self._pieces = lru_cache(maxsize=4)(self._cut)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_pieces"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._pieces = lru_cache(maxsize=4)(self._cut)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def stage_of(self, index: int) -> int:
        """The number of the stage that item `index` belongs to."""
        return int(np.searchsorted(self.ends, index, side="right"))

    def mean_over_tokens(self, which: int, value: Callable[[int], float]) -> float:
        """The mean of value(length of its sequence) over all tokens of a stage."""
        stage = self.stages[which]
        sizes, counts = np.unique(self._pieces(which, stage.length, 0)[1], return_counts=True)
        values = [value(int(size)) for size in sizes]
        examples = stage.repeated + stage.retrieval + stage.puzzles
        return examples * value(stage.length) + (1 - examples) * float(np.average(values, weights=counts * sizes))

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        which = self.stage_of(index)
        stage = self.stages[which]
        first = index - (int(self.ends[which - 1]) if which else 0)
        num_rows = max(1, self.batch_tokens // stage.length)
        rng = random.Random(f"{self.seed}/{index}")
        numbers = range(first * num_rows, (first + 1) * num_rows)
        rows = [self._row(rng, which, stage, number) for number in numbers]
        ids = torch.from_numpy(np.stack([row.ids for row in rows]))
        if self.layout == "rows":
            batch: dict[str, Any] = {"input_ids": ids, "labels": ids.clone()}
        else:
            batch = flatten(ids, [row.starts for row in rows])
        if self.answer_weight != 1.0:
            weights = torch.ones(ids.shape)
            for weight, row in zip(weights, rows, strict=True):
                for begin, end in row.answers:
                    weight[begin:end] = self.answer_weight
            batch["weights"] = (weights / weights.mean()).reshape(batch["labels"].shape)
        return batch

    def _row(self, rng: random.Random, which: int, stage: Stage, number: int) -> "_Row":
        kind = rng.random()
        if kind < stage.repeated:
            return _Row(_fit(self.encode(repeated_example(rng, stage.length)), stage.length))
        if kind < stage.repeated + stage.retrieval:
            asked = Retrieval(num_keys=stage.keys or None, style=stage.style)
            example = retrieval_example(rng, self.filler, stage.length, self.encode, asked)
            answers = [(answer.start, answer.end) for answer in example.answers]
            return _Row(np.asarray(example.ids, dtype=np.int64), answers=answers)
        if kind < stage.repeated + stage.retrieval + stage.puzzles:
            ids, answers = puzzle_row(rng, self.filler, stage.length, self.encode)
            return _Row(np.asarray(ids, dtype=np.int64), answers=answers)
        return self._text(which, stage.length, number)

    def _text(self, which: int, length: int, row: int) -> "_Row":
        """Row number `row` of this stage's passes over the text."""
        per_pass = max(1, int(self._pieces(which, length, 0)[2][-1]) // length)
        starts, sizes, ends = self._pieces(which, length, row // per_pass)
        place = (row % per_pass) * length
        out, boundaries = np.empty(length, np.int64), []
        filled = 0
        piece = int(np.searchsorted(ends, place, side="right"))
        while filled < length:
            skip = place + filled - int(ends[piece] - sizes[piece])
            take = min(length - filled, int(sizes[piece]) - skip)
            start = int(starts[piece]) + skip
            boundaries.append(filled)
            out[filled : filled + take] = self.documents.tokens[start : start + take]
            filled += take
            piece = (piece + 1) % len(ends)
            if piece == 0:
                place = -filled  # a corpus smaller than the row starts again
        return _Row(out, starts=boundaries)

    def _cut(self, which: int, length: int, turn: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pieces of at most `length` tokens in the order of one pass: their starts, sizes, and summed sizes."""
        rng = np.random.default_rng([self.seed, which, turn])
        starts, lengths = self.documents.starts[:-1], self.documents.lengths
        if self.layout == "rows":
            is_long = lengths >= length
            starts, lengths = starts[is_long], lengths[is_long]
            shifts = rng.integers(lengths % length + 1)
            starts, lengths = starts + shifts, lengths - shifts
            counts = lengths // length
        else:
            counts = -(-lengths // length)
        number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # of the piece in its document
        firsts = np.repeat(starts, counts) + number * length
        sizes = np.minimum(length, np.repeat(starts + lengths, counts) - firsts)
        order = rng.permutation(len(firsts))
        return firsts[order], sizes[order], np.cumsum(sizes[order])


@dataclass(frozen=True)
class _Row:
    """A row's tokens, where in it pieces of documents start, and where answers lie."""

    ids: np.ndarray
    starts: Sequence[int] = (0,)
    answers: Sequence[tuple[int, int]] = ()


class FixedBatches(Dataset):
    """Batches made beforehand, for evaluation."""

    def __init__(self, batches: list[dict[str, torch.Tensor]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.batches[index]


def text_batches(documents: Documents, length: int, batch_tokens: int, num_tokens: int) -> FixedBatches:
    """Rows of held-out text, evenly spread over the documents, `num_tokens` of them or as many as there are."""
    documents.require(length, "validation corpus")
    starts = [
        np.arange(start, start + size - length + 1, length)
        for start, size in zip(documents.starts, documents.lengths, strict=False)
    ]
    every = np.concatenate(starts)
    wanted = min(len(every), max(1, num_tokens // length))
    chosen = every[np.linspace(0, len(every) - 1, wanted).astype(int)]
    rows = [torch.from_numpy(documents.tokens[s : s + length].astype(np.int64)) for s in chosen]
    return _batched(rows, rows, max(1, batch_tokens // length))


def retrieval_batches(
    encode: Encode, filler: str, length: int, batch_tokens: int, num_rows: int, seed: int
) -> FixedBatches:
    """Retrieval rows with held-out names; only the answers' tokens are labelled."""
    rows, labels = [], []
    for number in range(num_rows):
        rng = random.Random(f"evaluation/{seed}/{number}")
        asked = Retrieval(num_keys=max(1, min(4, length // 40)), held_out=True)
        example = retrieval_example(rng, filler, length, encode, asked)
        ids = torch.tensor(example.ids)
        label = torch.full_like(ids, IGNORED)
        for answer in example.answers:
            label[answer.start : answer.end] = ids[answer.start : answer.end]
        rows.append(ids)
        labels.append(label)
    return _batched(rows, labels, max(1, batch_tokens // length))


def flatten(ids: torch.Tensor, boundaries: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Rows [b, t] with pieces starting at `boundaries` as one packed row [1, b * t]: no piece sees another.

    Returns:
        input_ids, labels and position_ids [1, b * t], and `cu_seq_lens_q` and `max_length_q` as in this module's
        docstring; everything is made on the CPU.
    """
    b, t = ids.shape
    starts = torch.tensor([row * t + start for row in range(b) for start in boundaries[row]])
    sizes = torch.diff(starts, append=torch.tensor([b * t]))
    positions = torch.arange(b * t) - starts.repeat_interleave(sizes)
    flat = ids.reshape(1, -1)
    labels = flat.clone()
    labels[0, starts] = IGNORED
    cu_seqlens = torch.full((max(FEWEST_BOUNDARIES, power_of_two(len(starts) + 1)),), b * t, dtype=torch.int32)
    cu_seqlens[: len(starts)] = starts
    return {
        "input_ids": flat,
        "labels": labels,
        "position_ids": positions[None],
        "cu_seq_lens_q": cu_seqlens,
        "max_length_q": power_of_two(int(sizes.max())),
    }


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


def unwrap(items: list[dict[str, Any]]) -> dict[str, Any]:
    """The collator: an item is a batch already."""
    (item,) = items
    return item


def _batched(rows: list[torch.Tensor], labels: list[torch.Tensor], size: int) -> FixedBatches:
    return FixedBatches(
        [
            {"input_ids": torch.stack(rows[i : i + size]), "labels": torch.stack(labels[i : i + size])}
            for i in range(0, len(rows), size)
        ]
    )


def _fit(ids: Sequence[int], length: int) -> np.ndarray:
    """The first `length` ids, again from the start where there are fewer."""
    return np.resize(np.asarray(list(ids), dtype=np.int64), length)
