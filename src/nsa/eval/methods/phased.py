"""A model with a method, as the tasks call it: prefill of the text, then one step for each token of the question."""

import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from nsa.eval.methods.cache import MethodCache, attached
from nsa.eval.methods.method import PHASES, Method
from nsa.eval.methods.nsa import keys_read


@dataclass
class Meter:
    """Sums over all calls; see `summary`."""

    queries: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))
    counted: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))  # of them, for their keys
    attended: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    scored: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    sequences: int = 0
    cache_bytes: float = 0.0

    def summary(self) -> dict[str, Any]:
        """Per phase: queries, keys of one query on average (over queries, layers and heads), seconds in all.

        `cache_bytes` is of one sequence at its end. Times are those of this library's torch operations, not of a
        method's own kernels.
        """
        phases = {}
        for phase in PHASES:
            counted = self.counted[phase]
            phases[phase] = {
                "queries": self.queries[phase],
                "attended": self.attended[phase] / counted if counted else None,
                "scored": self.scored[phase] / counted if counted else None,
                "seconds": self.seconds[phase],
            }
        return {**phases, "cache_bytes": round(self.cache_bytes / max(1, self.sequences)), "sequences": self.sequences}


class Phased(nn.Module):
    """Behaves as the model in the tasks of nsa.eval, with a method's attention.

    Tasks call `forward(input_ids, logits_to_keep=k, decode=d)`: all but the last d tokens are one prefill, the last d
    are fed one at a time, as generation does (teacher forcing makes the two the same).

    Args:
        model: of the Llama family; a model with NSA or InfLLM-V2 takes the method of that name and no other.
        method: see nsa.eval.methods.

    Raises:
        ValueError: if model and method do not go together.
    """

    has_phases = True

    def __init__(self, model: nn.Module, method: Method) -> None:
        super().__init__()
        attention = getattr(model.config, "attention", None)
        if method.native and attention != method.name:
            raise ValueError(
                f"the method {method.name} needs a model that has it (attention={method.name!r}), "
                f"got attention={attention!r}"
            )
        if not method.native:
            MethodCache(method, model)  # says what does not fit
        self.model, self.method, self.meter = model, method, Meter()

    @property
    def config(self) -> Any:
        return self.model.config

    def forward(
        self, input_ids: Tensor, use_cache: bool = False, logits_to_keep: int = 0, decode: int = 0
    ) -> SimpleNamespace:
        """Logits [b, k, v] of the last k positions (all for 0); `use_cache` is the tasks' word for "no cache left"."""
        if not 0 <= decode < input_ids.shape[1]:
            raise ValueError(f"expected decode from 0 to {input_ids.shape[1] - 1} of so many tokens, got {decode}")
        if self.method.native:
            return SimpleNamespace(logits=self._run(input_ids, logits_to_keep, decode, None))
        with attached(self.model):
            cache = MethodCache(self.method, self.model)
            logits = self._run(input_ids, logits_to_keep, decode, cache)
        self._count(cache)
        return SimpleNamespace(logits=logits)

    def _run(self, input_ids: Tensor, keep: int, decode: int, cache: Any) -> Tensor:
        border = input_ids.shape[1] - decode
        kept = max(1, keep - decode) if keep else 0
        started = self._clock()
        out = self.model(input_ids[:, :border], past_key_values=cache, use_cache=True, logits_to_keep=kept)
        prefilled = self._clock()
        parts, cache = [out.logits], out.past_key_values
        for place in range(border, input_ids.shape[1]):
            parts.append(self.model(input_ids[:, place : place + 1], past_key_values=cache, use_cache=True).logits)
        meter, b = self.meter, len(input_ids)
        meter.queries["prefill"] += b * border
        meter.queries["decode"] += b * decode
        meter.seconds["prefill"] += prefilled - started
        meter.seconds["decode"] += self._clock() - prefilled
        meter.sequences += b
        if self.method.native:
            meter.cache_bytes += cache.num_bytes()
            if not meter.counted["prefill"]:  # what it selects, once: asking is as much work as running
                counts = keys_read(self.model, input_ids[0].tolist(), decode)
                for phase, queries in (("prefill", border), ("decode", decode)):
                    meter.counted[phase] += queries
                    meter.attended[phase] += counts[phase].attended * queries
                    meter.scored[phase] += counts[phase].scored * queries
        logits = torch.cat(parts, dim=1)
        return logits[:, logits.shape[1] - keep :] if keep else logits

    def _count(self, cache: MethodCache) -> None:
        for phase in PHASES:
            queries = cache.counts.layers[0][phase].queries
            attended, scored = cache.counts.per_query(phase)
            self.meter.counted[phase] += queries
            self.meter.attended[phase] += attended * queries
            self.meter.scored[phase] += scored * queries
        self.meter.cache_bytes += cache.num_bytes()

    def _clock(self) -> float:
        if torch.cuda.is_available() and next(self.model.parameters()).is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()
