"""`nsa generate`: a model continues a prompt, token by token on the terminal."""

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from nsa.training.limits import Limits, check_numbers

LIMITS: dict[str, Limits] = {
    "max_new_tokens": (1, math.inf),
    "num_beams": (1, math.inf),
    "top_p": (0, 1),
    "seed": (0, 2**63 - 1),
}


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Continue a prompt with a trained model, streaming to the terminal.

    On a CUDA GPU decoding steps of an NSA model are CUDA graphs over a static cache. Lengths, speed, and how it was
    decoded are said at the end, on standard error.

    Examples:
        nsa generate runs/nsa --prompt "def main("
        nsa generate runs/nsa --prompt "import os" --temperature 0.7 --top-p 0.9 --seed 1
        nsa generate runs/nsa --prompt "class " --num-beams 4
        nsa generate runs/nsa --prompt - --prefill-chunk 8192 < book.txt
        cat start.py | nsa generate runs/nsa --prompt -
    """

    model: Annotated[Path, tyro.conf.Positional]
    """Folder of the model: a run of `nsa train`, one of its checkpoints, or any causal LM of transformers."""
    prompt: str
    """Text to continue; - reads it from standard input."""
    max_new_tokens: int = 256
    temperature: float = 0.0
    """0: the likeliest token; above: sampling."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that together have this probability."""
    num_beams: int = 1
    """Above 1: beam search, shown when it is done."""
    prefill_chunk: int = 16384
    """A longer prompt is read in chunks of so many tokens, which bounds the memory that it takes; 0: at once."""
    seed: int = 0
    trust_remote_code: bool = False
    """Run the Python files that a folder brings for its own kind of model."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


def generate(config: GenerateConfig) -> str:
    """The continuation, which has been written to standard output as it came.

    Raises:
        ValueError: values out of range, or a folder that holds no model, in one line.
    """
    check_numbers(config, LIMITS)
    if config.top_p == 0:
        raise ValueError("expected top_p in (0, 1], got 0")
    if config.top_p < 1 and not config.temperature:
        raise ValueError(f"top_p is of sampling: expected a temperature above 0 beside it, got top_p={config.top_p}")
    prompt = _prompt(config.prompt)

    import torch
    import transformers

    from nsa.training.loading import load_model

    cuda = torch.cuda.is_available() and config.device != "cpu"
    if config.device == "cuda" and not cuda:
        raise ValueError("--device cuda: torch sees no CUDA device here")
    model, tokenizer = load_model(config.model, trust_remote_code=config.trust_remote_code)
    model.to("cuda" if cuda else "cpu").eval()

    ids = tokenizer.encode(prompt, add_special_tokens=False)
    if not ids and tokenizer.bos_token_id is None:
        raise ValueError("the prompt is empty, and the tokenizer has no token to begin with")
    ids = ids or [tokenizer.bos_token_id]
    known = model.get_input_embeddings().num_embeddings
    if max(ids) >= known:
        raise ValueError(
            f"the tokenizer in {config.model} is not the model's: it gives the token {max(ids)} of only {known}"
        )
    streamer = None
    if config.num_beams == 1:
        streamer = transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    options: dict[str, float | int] = {}
    if config.temperature:
        options = {"temperature": config.temperature, "top_p": config.top_p, "top_k": 0}
    if 0 < config.prefill_chunk < len(ids):
        options["prefill_chunk_size"] = config.prefill_chunk
    torch.manual_seed(config.seed)
    inputs = torch.tensor([ids], device=model.device)
    print(prompt, end="", flush=True)
    started, verbosity = time.perf_counter(), transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # what it warns of would stand in the middle of the text
    try:
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=config.max_new_tokens,
            do_sample=config.temperature > 0,
            num_beams=config.num_beams,
            streamer=streamer,
            pad_token_id=tokenizer.pad_token_id,
            **options,
        )
    finally:
        transformers.logging.set_verbosity(verbosity)
    text = tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
    if streamer is None:
        print(text)
    made, seconds = output.shape[1] - len(ids), time.perf_counter() - started
    path = getattr(model, "decode_path", "transformers' own decoding")
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or output.shape[1]
    beyond = max(0, output.shape[1] - positions)
    remark = f"; {beyond} tokens are beyond the {positions} positions it was made for" if beyond else ""
    print(f"{len(ids)} tokens read, {made} made in {seconds:.2f} s; {path}{remark}", file=sys.stderr)
    return text


def _prompt(given: str) -> str:
    """The prompt, from standard input for a dash; ValueError in one line where its bytes are no UTF-8."""
    try:
        prompt = sys.stdin.read() if given == "-" else given
        prompt.encode()  # what the shell passed on of other bytes
    except (UnicodeEncodeError, UnicodeDecodeError) as error:
        raise ValueError(f"the prompt is not UTF-8 text ({error.reason})") from error
    return prompt
