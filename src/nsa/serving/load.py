"""Load for a running OpenAI server: requests that arrive at random, and what each of them waited for."""

import asyncio
import json
import math
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass
class Answer:
    """When (s) a request was sent, and its tokens came; why it failed, if it did."""

    sent: float
    tokens: list[float] = field(default_factory=list)
    error: str = ""


@dataclass(frozen=True)
class Load:
    """What is sent to a server at one rate."""

    rate: float
    requests: int
    prompt_length: int
    new_tokens: int
    tokens: tuple[int, int]
    seed: int

    def arrivals(self) -> list[float]:
        """Seconds after the start, a Poisson process; all 0 for a rate of 0."""
        draw, now, found = random.Random(self.seed), 0.0, []
        for _ in range(self.requests):
            found.append(now)
            now += draw.expovariate(self.rate) if self.rate else 0.0
        return found

    def prompts(self) -> list[list[int]]:
        draw = random.Random(f"{self.seed} {self.rate}")
        return [[draw.randrange(*self.tokens) for _ in range(self.prompt_length)] for _ in range(self.requests)]


async def send(server: str, load: Load, key: str | None) -> tuple[str, list[Answer], float]:
    """The model's name, the answers, and the seconds from the first request to the last token.

    Raises:
        ValueError: nobody answers there, in one line.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with httpx.AsyncClient(base_url=server.rstrip("/"), headers=headers, timeout=None) as client:
        try:
            found = (await client.get("/models")).raise_for_status().json()
            model = found["data"][0]["id"]
        except (httpx.HTTPError, KeyError, IndexError, ValueError) as error:
            raise ValueError(f"{server}: expected an OpenAI server, got {type(error).__name__}: {error}") from error
        await _ask(client, model, Answer(0.0), load.prompts()[0][:8], 2)  # what is made at the first request
        start = time.perf_counter()
        answers = [Answer(arrival) for arrival in load.arrivals()]
        await asyncio.gather(*(
            _later(client, model, load, answer, prompt, start)
            for answer, prompt in zip(answers, load.prompts(), strict=True)
        ))  # fmt: skip
    return model, answers, max((a.tokens[-1] for a in answers if a.tokens), default=start) - start


async def _later(
    client: httpx.AsyncClient, model: str, load: Load, answer: Answer, prompt: list[int], start: float
) -> None:
    await asyncio.sleep(start + answer.sent - time.perf_counter())
    answer.sent = time.perf_counter()
    await _ask(client, model, answer, prompt, load.new_tokens)


async def _ask(client: httpx.AsyncClient, model: str, answer: Answer, prompt: list[int], count: int) -> None:
    body: dict[str, Any] = {
        "model": model, "prompt": prompt, "max_tokens": count, "temperature": 0, "stream": True, "ignore_eos": True,
        "return_token_ids": True,
    }  # fmt: skip
    try:
        async with client.stream("POST", "/completions", json=body) as response:
            if response.is_error:
                answer.error = f"{response.status_code}: {(await response.aread()).decode()[:200]}"
                return
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                choices = json.loads(line[6:]).get("choices")
                if choices:  # an event may carry several tokens
                    answer.tokens += [time.perf_counter()] * max(1, len(choices[0].get("token_ids") or ()))
    except httpx.HTTPError as error:
        answer.error = f"{type(error).__name__}: {error}"


def summary(answers: Sequence[Answer], seconds: float) -> dict[str, float]:
    """Requests and tokens a second; milliseconds to the first token and between tokens, median and 99th percentile."""
    whole = [answer for answer in answers if not answer.error and answer.tokens]
    first = [1000 * (answer.tokens[0] - answer.sent) for answer in whole]
    between = [1000 * (b - a) for answer in whole for a, b in zip(answer.tokens, answer.tokens[1:], strict=False)]
    found = {
        "requests": len(answers), "failed": len(answers) - len(whole), "seconds": seconds,
        "requests_per_s": len(whole) / seconds if seconds > 0 else 0.0,
        "tokens_per_s": sum(len(answer.tokens) for answer in whole) / seconds if seconds > 0 else 0.0,
    }  # fmt: skip
    for name, values in (("first_token_ms", first), ("between_tokens_ms", between)):
        found[f"{name}_median"] = statistics.median(values) if values else float("nan")
        found[f"{name}_p99"] = percentile(values, 0.99)
    return found


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of them do not exceed; NaN of none."""
    if not values:
        return float("nan")
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
