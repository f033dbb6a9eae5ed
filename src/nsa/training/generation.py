"""`nsa generate`: a model continues a prompt, token by token on the terminal."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


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
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def run(self) -> None:
        generate(self)


def generate(config: GenerateConfig) -> str:
    """The continuation, which has been written to standard output as it came.

    Raises:
        ValueError: values out of range, or a folder that holds no model, in one line.
    """
    if config.max_new_tokens < 1 or config.num_beams < 1:
        raise ValueError(
            f"max_new_tokens and num_beams should be at least 1, got {config.max_new_tokens} and {config.num_beams}"
        )
    if config.temperature < 0.0 or not 0.0 < config.top_p <= 1.0:
        raise ValueError(
            "temperature should be at least 0 and top_p in (0, 1], got "
            f"temperature={config.temperature}, top_p={config.top_p}"
        )
    if config.prefill_chunk < 0:
        raise ValueError(f"prefill_chunk should be at least 0, got {config.prefill_chunk}")
    if not (config.model / "config.json").exists():
        raise ValueError(f"{config.model} holds no model: expected a folder with config.json")
    prompt = sys.stdin.read() if config.prompt == "-" else config.prompt

    import torch
    import transformers

    import nsa.models  # noqa: F401  (makes the Auto classes know NSA)
    from nsa.training.tokenizer import load_tokenizer

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = load_tokenizer(str(config.model))
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(config.model, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"no model could be loaded from {config.model}: {str(error).splitlines()[0]}") from error
    cuda = torch.cuda.is_available() and config.device != "cpu"
    model.to("cuda" if cuda else "cpu").eval()

    ids = tokenizer.encode(prompt, add_special_tokens=False) or [tokenizer.bos_token_id]
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
    started = time.perf_counter()
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
    text = tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
    if streamer is None:
        print(text)
    made, seconds = output.shape[1] - len(ids), time.perf_counter() - started
    path = getattr(model, "decode_path", "transformers' own decoding")
    print(f"{len(ids)} tokens read, {made} made in {seconds:.2f} s; {path}", file=sys.stderr)
    return text
