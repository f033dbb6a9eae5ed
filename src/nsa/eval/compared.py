"""What a comparison is of: a model that methods are laid over, and trained models beside it, asked the same."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nsa.eval.methods import METHODS
from nsa.eval.methods.nsa import keys_of_last
from nsa.eval.models import Candidate, load, names_of
from nsa.eval.runner import text_of
from nsa.eval.text import held_out_text
from nsa.training.tokenizer import encoder

if TYPE_CHECKING:
    from nsa.eval.arguments import CompareArguments

PROBE = 4000  # characters that two tokenizers of one vocabulary must also cut alike


@dataclass(frozen=True)
class Compared:
    """`model` has the methods' rows; each of `trained` is a row by itself, with the tokenizer of `model`."""

    model: Candidate
    trained: list[Candidate]

    def of(self, folder: Path) -> Candidate:
        return next(candidate for candidate in (self.model, *self.trained) if candidate.folder == folder)

    def budget(self, asked: float | None, length: int) -> float | None:
        """Keys that a query may read: those asked for, else those that the first trained model reads."""
        if asked is not None or not self.trained:
            return asked
        return keys_of_last(self.trained[0].config, length)


def load_compared(arguments: CompareArguments) -> Compared:
    """All models of the command.

    Raises:
        ValueError: in one line, a trained model that is dense, or of another vocabulary than the model; trained models
            beside one that is not dense.
    """
    model = load_folder(arguments, arguments.model)
    names = names_of(list(arguments.trained)) if arguments.trained else []
    if arguments.trained and (attention := getattr(model.config, "attention", "dense")) != "dense":
        raise ValueError(f"--trained: expected a dense MODEL beside them, got {model.folder} with {attention=}")
    trained = []
    probe = held_out_text(text_of(arguments.text, [arguments.model, *arguments.trained]))[:PROBE]
    for folder, name in zip(arguments.trained, names, strict=True):
        candidate = load_folder(arguments, folder)
        check_trained(candidate, model, probe)
        trained.append(replace(candidate, name=f"trained {name}", tokenizer=model.tokenizer))
    return Compared(model, trained)


def load_folder(arguments: CompareArguments, folder: Path) -> Candidate:
    return load(
        folder,
        name=folder.name,
        device=arguments.device,
        dtype=arguments.dtype,
        trust_remote_code=arguments.trust_remote_code,
    )


def check_trained(candidate: Candidate, model: Candidate, probe: str) -> None:
    """ValueError in one line unless it is sparse by training and cuts a text into the tokens of `model`."""
    native = [name for name, method in METHODS.items() if method.native]
    if candidate.attention not in native:
        expected = f"expected a model with attention {' or '.join(map(repr, native))}"
        raise ValueError(f"--trained {candidate.folder}: {expected}, got {candidate.attention!r}")
    own, other = candidate.tokenizer, model.tokenizer
    sizes = [one.config.vocab_size for one in (candidate, model)]
    alike = own.get_vocab() == other.get_vocab() and encoder(own)(probe) == encoder(other)(probe)
    if sizes[0] != sizes[1] or not alike:
        raise ValueError(
            f"--trained {candidate.folder}: expected the tokens of {model.folder} ({sizes[1]:,}), got {sizes[0]:,}"
            + (" others" if sizes[0] == sizes[1] else "")
            + "; prompts and losses of two vocabularies do not compare"
        )
