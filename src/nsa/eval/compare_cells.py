"""The cells of a comparison: one method or trained model, one length, one task, and all that its numbers depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nsa.eval.compared import Compared
from nsa.eval.methods import METHODS, Method, split
from nsa.eval.models import device_of
from nsa.eval.runner import text_of
from nsa.eval.tasks import PUZZLES, Continuation, MultiValue, Needle, Perplexity, Recall, Task
from nsa.eval.tasks.lm_eval import PREFIX, LMEval
from nsa.eval.text import held_out_text

if TYPE_CHECKING:
    from nsa.eval.arguments import CompareArguments


@dataclass(frozen=True)
class Cell:
    """A row of the tables, a length and a task; `identity` is everything that its numbers depend on.

    `row` is the method's name, or that of a trained model, which lies in `folder`.
    """

    row: str
    folder: Path
    method: Method
    length: int
    task: Task
    identity: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.row}: {self.task.name} at {self.length}"

    @property
    def key(self) -> str:
        return _digest(self.identity)

    @property
    def preparation(self) -> str:
        """The same for all cells that share what the method does offline."""
        return _digest({key: value for key, value in self.identity.items() if key not in ("task", "parameters")})


def methods_for(arguments: CompareArguments, compared: Compared) -> list[str]:
    """The methods asked for; else those that the model can run."""
    if arguments.methods:
        return list(arguments.methods)
    own = compared.model.attention
    if own in METHODS and METHODS[own].native:
        return [own]
    return [name for name, method in METHODS.items() if not method.native]


def cells_of(arguments: CompareArguments, compared: Compared) -> Iterator[Cell]:
    """All cells, the short lengths first, so that early rows are there for every row of the tables."""
    folders = [arguments.model, *arguments.trained]
    fingerprints = {folder: fingerprint_of(folder) for folder in folders}
    text = text_of(arguments.text, folders)
    text_digest = hashlib.sha256(held_out_text(text).encode(errors="surrogatepass")).hexdigest()[:16]
    tokenizer = compared.model.tokenizer
    chat = {"auto": bool(getattr(tokenizer, "chat_template", None)), "yes": True, "no": False}[arguments.chat]
    for length in sorted(arguments.lengths):
        tasks = [task_of(name, arguments, length, text, chat) for name in arguments.tasks]
        shares = split(length, compared.budget(arguments.budget, length))
        rows = [(name, arguments.model, METHODS[name].at_budget(shares)) for name in methods_for(arguments, compared)]
        for candidate in compared.trained:
            rows.append((candidate.name, candidate.folder, METHODS[candidate.attention].at_budget(shares)))
        for row, folder, method in rows:
            for task in tasks:
                identity = {
                    "model": fingerprints[folder],
                    "method": method.name,
                    "sizes": asdict(method),
                    "length": length,
                    "task": task.name,
                    "parameters": asdict(task),  # type: ignore[call-overload]
                    "text": text_digest,  # Python sources are other ones after an installation
                    "dtype": arguments.dtype,
                    "device": device_of(arguments.device).type,
                }
                yield Cell(row, folder, method, length, task, json.loads(json.dumps(identity)))


def task_of(name: str, arguments: CompareArguments, length: int, text: str, chat: bool) -> Task:
    """A task with the command's parameters at one length."""
    shared: dict[str, Any] = {"samples": arguments.samples, "text": text}
    asked: dict[str, Any] = {**shared, "seed": arguments.seed, "chat": chat}
    if name.startswith(PREFIX):
        folder = str(arguments.lm_eval_path) if arguments.lm_eval_path else None
        return LMEval(task=name.removeprefix(PREFIX), samples=arguments.samples, path=folder)
    if name in PUZZLES:
        return PUZZLES[name](lengths=(length,), **asked)
    made: dict[str, Any] = {
        Needle.name: lambda: Needle(lengths=(length,), depths=arguments.depths, **asked),
        Recall.name: lambda: Recall(
            length=length, window_size=None, num_keys=arguments.keys, hops=arguments.hops, **asked
        ),
        MultiValue.name: lambda: MultiValue(length=length, num_values=arguments.values, **asked),
        Perplexity.name: lambda: Perplexity(length=length, **shared),
        Continuation.name: lambda: Continuation(length=length, decode=arguments.decode, **shared),
    }
    return made[name]()


def fingerprint_of(folder: Path) -> str:
    """Tells models apart by their configuration, tokenizer and weights.

    All of the weights: a model whose embeddings training left alone begins, byte for byte, as the one before it.
    """
    digest = hashlib.sha256()
    for file in (folder / name for name in ("config.json", "tokenizer.json", "chat_template.jinja")):
        digest.update(file.read_bytes() if file.is_file() else b"-")
    for file in sorted((*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin"))):
        digest.update(f"{file.name} {file.stat().st_size}".encode())
        with file.open("rb") as weights:
            while part := weights.read(1 << 24):
                digest.update(part)
    return digest.hexdigest()[:16]


def _digest(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
