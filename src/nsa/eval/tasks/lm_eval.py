"""Any task of lm-eval (EleutherAI's harness), with the phases kept apart: the context is prefill, the rest decode."""

from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import nn

from nsa.eval.methods.cache import MethodCache, attached
from nsa.eval.tasks.task import Advance, Row, ignore

PREFIX = "lm_eval:"


@dataclass(frozen=True, kw_only=True)
class LMEval:
    """One task (or group) of lm-eval through its HFLM; one row a metric.

    Log-likelihoods are computed one request at a time, the continuation step by step, so that methods that are sparse
    in decode take part; generation uses the method's cache. LongBench's and RULER's tasks work where their data is at
    hand.

    Args:
        task: the task's name in lm-eval, or in a YAML file of `path`.
        samples: documents of it.
        path: a folder of further task files.

    Needs the package lm-eval.
    """

    name: ClassVar[str] = "lm_eval"

    task: str
    samples: int = 100
    path: str | None = None

    def num_steps(self, tokenizer: Any) -> int:
        return 1

    def run(self, model: nn.Module, tokenizer: Any, advance: Advance = ignore) -> list[Row]:
        harness = _import()
        found = harness.simple_evaluate(
            model=_phased_lm(harness, model, tokenizer),
            tasks=[self.task],
            limit=self.samples,
            task_manager=_manager(self.path),
            log_samples=False,
            bootstrap_iters=0,
        )
        advance(1)
        rows = []
        for task, metrics in sorted(found["results"].items()):
            n = int(found.get("n-samples", {}).get(task, {}).get("effective", self.samples))
            for metric, value in metrics.items():
                if isinstance(value, float | int) and "stderr" not in metric and metric != "sample_len":
                    label = metric.removesuffix(",none")
                    error = metrics.get(metric.replace(",", "_stderr,"), float("nan"))
                    error = error if isinstance(error, float) else float("nan")
                    rows.append(Row(task=self.name, unit=label, where={"task": task, "metric": label},
                                    value=float(value), low=value - 1.96 * error, high=value + 1.96 * error, n=n,
                                    values=[]))  # fmt: skip
        if not rows:
            raise ValueError(f"lm-eval's task {self.task} gave no numbers")
        return rows


@lru_cache(maxsize=4)  # it reads thousands of files
def _manager(path: str | None) -> Any:
    return _import().tasks.TaskManager(include_path=path)


def _import() -> Any:
    import lm_eval
    import lm_eval.models.huggingface
    import lm_eval.tasks

    return lm_eval


def _phased_lm(harness: Any, model: Any, tokenizer: Any) -> Any:
    """HFLM over the model inside a Phased, with its method in log-likelihoods and in generation."""

    class PhasedLM(harness.models.huggingface.HFLM):  # type: ignore[misc, name-defined]
        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **kwargs: Any) -> list[Any]:
            answers = []
            for _, context, continuation in requests:
                tokens = torch.tensor([(context + continuation)[-(self.max_length + 1) :]])
                count = min(len(continuation), tokens.shape[1] - 1)
                with torch.inference_mode():
                    inputs = tokens[:, :-1].to(self.device)
                    logits = model(inputs, logits_to_keep=count, decode=min(count - 1, inputs.shape[1] - 1)).logits
                log_p = logits[0].float().log_softmax(-1).cpu()
                targets = tokens[0, -count:]
                right = bool((log_p.argmax(-1) == targets).all())
                answers.append((float(log_p.gather(1, targets[:, None]).sum()), right))
            return answers

        def _model_generate(self, context: Any, max_length: int, stop: Any, **kwargs: Any) -> Any:
            if model.method.native:
                return super()._model_generate(context, max_length, stop, **kwargs)
            with attached(model.model):
                kwargs["past_key_values"] = MethodCache(model.method, model.model)
                return super()._model_generate(context, max_length, stop, **kwargs)

    if not getattr(model, "has_phases", False):
        model = _Plain(model)
    return PhasedLM(pretrained=model.model, tokenizer=tokenizer, batch_size=1)


class _Plain:
    """A model without a method, called as one with phases."""

    method = SimpleNamespace(native=True)

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, tokens: Any, logits_to_keep: int, decode: int) -> Any:
        return self.model(tokens, use_cache=False, logits_to_keep=logits_to_keep)
