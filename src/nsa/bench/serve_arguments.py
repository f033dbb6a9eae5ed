"""The arguments of `nsa bench serve`; without torch, so that `--help` is fast."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class ServeArguments:
    """A running OpenAI server under load: requests a second, time to the first token, time between tokens.

    Requests arrive at random (a Poisson process) at each of the rates, whether or not earlier ones are answered; a rate
    of 0 sends all at once. Prompts are random token numbers, so that no two share a prefix. Several servers (NSA, and
    its dense twin) are measured one after another at each rate.

    Examples:
        nsa bench serve http://127.0.0.1:8000/v1
        nsa bench serve http://127.0.0.1:8000/v1 http://127.0.0.1:8001/v1 --rates 0 2 --prompt-length 2000
        nsa bench serve http://127.0.0.1:8000/v1 --requests 200 --output serve_cpu
    """

    servers: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Addresses of the servers, with /v1."""
    rates: tuple[float, ...] = (1.0, 4.0)
    """Requests that arrive in a second, on average."""
    requests: int = 32
    """Requests at each rate."""
    prompt_length: int = 512
    """Tokens of a prompt."""
    new_tokens: int = 64
    """Tokens of an answer."""
    tokens: tuple[int, int] = (3, 250)
    """Prompts are made of the token numbers from the first to before the second."""
    seed: int = 0
    """Of arrivals and prompts."""
    api_key: Annotated[str | None, tyro.conf.arg(metavar="STR")] = None
    """If the servers ask for one. Default: the environment's VLLM_API_KEY."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="STEM")] = None
    """Write STEM.json and STEM.md."""
    json: bool = False
    """Print the result as JSON instead of a table."""
