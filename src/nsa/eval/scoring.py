"""How answers are judged: exact match and loss, each from one forward pass, each with its uncertainty.

An answer counts as right when greedy decoding would print it in full. Greedy decoding prints the answer if and
only if, with the answer itself as input (teacher forcing), the argmax before each of its tokens is that token:
up to the first wrong token the two inputs are the same. So one forward pass over `prompt + answer` replaces a
generation, and a batch of prompts of the same length needs no padding.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nsa.eval.prompts import Prompt

TOKENS_PER_BATCH = 16_384  # a few seconds of CPU for a small model, a fraction of any GPU's memory
LOGITS_PER_BATCH = 2**28  # 1 GiB of float32: of a large vocabulary the logits are larger than all else


def exact_match(
    model: nn.Module, prompts: Sequence[Prompt], advance: Callable[[int], None] | None = None
) -> list[bool]:
    """Does the model's greedy continuation of each prompt equal its answer, in every token?

    See `token_matches`.
    """
    return [all(matches) for matches in token_matches(model, prompts, advance)]


def shares_found(
    model: nn.Module, asked: Sequence[tuple[Prompt, Sequence[tuple[int, int]]]], advance: Callable[[int], None]
) -> list[float]:
    """Of each prompt the share of its answer's spans of tokens that greedy decoding says, given what is before them."""
    matches = token_matches(model, [prompt for prompt, _ in asked], advance)
    return [
        sum(all(match[a:b]) for a, b in spans) / len(spans) for (_, spans), match in zip(asked, matches, strict=True)
    ]


def token_matches(
    model: nn.Module, prompts: Sequence[Prompt], advance: Callable[[int], None] | None = None
) -> list[list[bool]]:
    """For each token of each prompt's answer: would greedy decoding say it, given the answer's tokens before it?

    Args:
        model: called as `model(input_ids=[b, t], use_cache=False, logits_to_keep=k)`; `.logits` of what it returns
            are those of the last k positions, as with every causal language model of transformers. A model that
            says `has_phases` is also given `decode=d`: question and answer are its last d tokens.
        prompts: in any order and of any lengths; prompts of one length share a batch.
        advance: called with the number of prompts just finished.

    Returns:
        One list a prompt, in the order given.
    """
    right: list[list[bool]] = [[]] * len(prompts)
    for indices in _batches([(len(p.tokens), len(p.answer), p.question) for p in prompts]):
        batch = [prompts[i] for i in indices]
        answer = torch.tensor([p.answer for p in batch])
        tokens = torch.tensor([p.tokens + p.answer[:-1] for p in batch])
        decode = min(batch[0].question + answer.shape[1] - 1, tokens.shape[1] - 1)
        logits = _logits(model, tokens, answer.shape[1], decode)
        matches = (logits.argmax(dim=-1).cpu() == answer).tolist()
        for i, match in zip(indices, matches, strict=True):
            right[i] = match
        if advance is not None:
            advance(len(indices))
    return right


def token_losses(
    model: nn.Module, tokens: Int[Tensor, "b t"], last: int | None = None, decode: int = 0
) -> Float[Tensor, "b last"]:
    """-log p(tokens[:, i + 1] | tokens[:, : i + 1]) in nats, at least fp32, for the last positions i (all for None).

    `decode` is for models that keep phases apart: so many inputs at the end are fed one at a time.
    """
    last = tokens.shape[1] - 1 if last is None else last
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", 1)
    rows = max(1, LOGITS_PER_BATCH // (last * vocabulary))
    parts = []
    for some in tokens.split(rows):
        logits = _logits(model, some[:, :-1], last, decode)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        targets = some[:, -last:].to(logits.device)
        parts.append(nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none").cpu())
    return torch.cat(parts)


def wilson(correct: float, n: int) -> tuple[float, float]:
    """The 95% Wilson score interval of a proportion: honest also at 0 of n and at n of n.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    if n == 0:
        return 0.0, 1.0
    z = 1.959964  # the normal distribution's 97.5% quantile
    p, z2 = correct / n, z * z
    center = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return (0.0 if correct == 0 else max(0.0, center - half)), (1.0 if correct == n else min(1.0, center + half))


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error; the error of fewer than two values is NaN, for nothing is known of it."""
    n = len(values)
    mean = math.fsum(values) / n if n else math.nan
    if n < 2:
        return mean, math.nan
    variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1)
    return mean, math.sqrt(variance / n)


def _logits(model: nn.Module, tokens: Int[Tensor, "b t"], keep: int, decode: int = 0) -> Float[Tensor, "b keep v"]:
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if vocabulary is not None and int(tokens.max()) >= vocabulary:
        raise ValueError(f"the tokenizer gave token {int(tokens.max())}, but the model's vocabulary has {vocabulary}")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    phases = {"decode": decode} if getattr(model, "has_phases", False) else {}
    with torch.inference_mode():
        return model(input_ids=tokens.to(device), use_cache=False, logits_to_keep=keep, **phases).logits


def _batches(sizes: Sequence[tuple[int, int, int]]) -> Iterator[list[int]]:
    """Indices grouped by equal (prompt, answer, question) length, at most TOKENS_PER_BATCH tokens a group."""
    groups: dict[tuple[int, int, int], list[int]] = {}
    for index, size in enumerate(sizes):
        groups.setdefault(size, []).append(index)
    for (prompt, answer, _), indices in groups.items():
        step = max(1, TOKENS_PER_BATCH // (prompt + answer))
        for start in range(0, len(indices), step):
            yield indices[start : start + step]
