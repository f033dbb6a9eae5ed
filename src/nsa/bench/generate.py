"""`nsa bench generate`: a language model that decodes, beside its dense twin; both with random weights."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from nsa.bench.arguments import GenerateArguments
from nsa.bench.dense_decoding import BACKENDS, DenseDecoder
from nsa.bench.layer import DENSE_BACKENDS
from nsa.bench.result import Entry
from nsa.bench.timing import interleaved, peak_gib
from nsa.models import NSALlamaCache, NSALlamaConfig, NSALlamaForCausalLM
from nsa.models.captured_step import CapturedStep
from nsa.models.plan import plan

STEPS = 8  # of decoding that are timed as one, since a step takes little


@torch.no_grad()
def measure(arguments: GenerateArguments, device: str = "cuda") -> Iterator[Entry]:
    """Of every length, in the order in which they were given: decoding steps, generate(), first token."""
    nsa, dense = (random_model(arguments, attention, device) for attention in ("nsa", "dense"))
    for length in dict.fromkeys((*arguments.lengths, *arguments.generate_at, *arguments.prompts)):
        if length in arguments.lengths:
            for batch in arguments.batches:
                yield decoding_step(arguments, nsa, dense, length, batch)
                _free()
        if length in arguments.generate_at:
            yield whole_generation(arguments, nsa, dense, length, max(arguments.batches))
            _free()
        if length in arguments.prompts:
            yield first_token(arguments, nsa, dense, length)
            _free()


def configuration(arguments: GenerateArguments, attention: str) -> NSALlamaConfig:
    return NSALlamaConfig(
        attention=attention,
        vocab_size=arguments.vocab_size,
        hidden_size=arguments.hidden_size,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.kv_heads,
        head_dim=arguments.head_dim,
        intermediate_size=arguments.intermediate_size,
        max_position_embeddings=1 << 20,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )


def random_model(arguments: GenerateArguments, attention: str, device: str) -> NSALlamaForCausalLM:
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return NSALlamaForCausalLM(configuration(arguments, attention)).eval()
    finally:
        torch.set_default_dtype(before)


# ---- a decoding step ---------------------------------------------------------------------------------------------


def decoding_step(
    arguments: GenerateArguments, nsa: NSALlamaForCausalLM, dense: NSALlamaForCausalLM, length: int, batch: int
) -> Entry:
    """Milliseconds of one step. Each candidate has its caches to itself, since together they might not fit."""
    ids = torch.randint(arguments.vocab_size, (batch, 1), device=nsa.device)
    ms: dict[str, float] = {}

    def timed(name: str, step: Callable[[], object], steps: int) -> None:
        def run() -> None:
            for _ in range(steps):
                step()

        ms[name] = interleaved({name: run}, arguments.repetitions)[name] / steps
        _free()

    room = 4 + STEPS * (arguments.repetitions + 1)
    for name, capture in (("NSA", True), ("NSA, no graph", False)):
        cache = filled_cache(nsa, batch, length, room)
        decoder = CapturedStep(nsa, cache, masked=False, capture=capture)
        decoder(ids), decoder(ids)
        timed(name, partial(decoder, ids), STEPS)
        del decoder, cache
    for name, backend in BACKENDS.items():
        dense_decoder = DenseDecoder(dense, batch, length, backend)
        dense_decoder(ids)
        timed(f"dense, {name}", partial(dense_decoder, ids), STEPS)
        del dense_decoder
    for name, room_there in (("dense, transformers", None), ("dense, transformers, static", room)):
        past = filled_dense_cache(dense, batch, length, room_there)
        timed(name, partial(dense.forward, ids, past_key_values=past, use_cache=True), STEPS)
        del past
    facts = {"rows": float(batch)}
    facts |= {f"{name}: bytes": float(p.step_bytes) for name, p in _plans(arguments, length, batch).items()}
    return Entry(
        length=length,
        inputs=f"batch {batch}",
        part="decoding step, caches filled with random numbers",
        ms=ms,
        facts=facts,
    )


def filled_cache(model: NSALlamaForCausalLM, batch: int, length: int, room: int) -> NSALlamaCache:
    """`length` tokens of random keys and values in every row."""
    cache = NSALlamaCache(model.config, layout="static", max_length=length + room)
    width, g = model.config.head_dim, model.config.num_key_value_heads
    for layer in cache.layers:
        layer.nsa.allocate(batch, g, width, width, model.dtype, model.device)
        tensors = layer.nsa.tensors
        for name in ("k", "v", "k_cmp", "v_cmp", "k_win", "v_win", "k_raw", "v_raw"):
            getattr(tensors, name).normal_()
        tensors.lengths.fill_(length)
        layer.nsa.know_lengths([length] * batch)
        layer.num_columns = length
    return cache


def filled_dense_cache(model: NSALlamaForCausalLM, batch: int, length: int, room: int | None) -> Cache:
    """transformers' own: one that grows, or a static one with room for more tokens."""
    config = model.config
    cache: Cache = (
        DynamicCache(config=config) if room is None else StaticCache(config=config, max_cache_len=length + room)
    )
    shape = (batch, config.num_key_value_heads, length, config.head_dim)
    for layer in range(config.num_hidden_layers):
        k, v = (torch.randn(shape, dtype=model.dtype, device=model.device) for _ in range(2))
        cache.update(k, v, layer)
    return cache


# ---- from prompt to last token -----------------------------------------------------------------------------------


class Clock(StoppingCriteria):
    """When each token was there; it stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def whole_generation(
    arguments: GenerateArguments, nsa: NSALlamaForCausalLM, dense: NSALlamaForCausalLM, length: int, batch: int
) -> Entry:
    """Milliseconds between tokens, the median of one run after a short warm-up; what comes before is in the facts."""
    ms, facts = {}, {"rows": float(batch)}
    for name, model, options in (
        ("NSA", nsa, {"prefill_chunk_size": arguments.prefill_chunk}),
        ("dense, transformers", dense, {}),
    ):
        _generate(model, batch, min(length, 1024), 4, **options)
        started, clock = _generate(model, batch, length, arguments.new_tokens, **options)
        waits = [(after - before) * 1e3 for before, after in pairwise(clock.times)]
        ms[name] = statistics.median(waits[2:])
        # The two steps before may compile for a new shape, and capture.
        facts[f"{name}: first token, s"] = clock.times[0] - started
        facts[f"{name}: second and third token, ms"] = sum(waits[:2])
        facts[f"{name}: all tokens, s"] = clock.times[-1] - started
        _free()
    facts |= {f"{name}: bytes": float(p.step_bytes) for name, p in _plans(arguments, length, batch).items()}
    return Entry(length=length, inputs=f"batch {batch}", part="generate()", ms=ms, facts=facts)


def _generate(
    model: NSALlamaForCausalLM, batch: int, length: int, new_tokens: int, **options: Any
) -> tuple[float, Clock]:
    ids, clock = torch.randint(model.config.vocab_size, (batch, length), device=model.device), Clock()
    torch.cuda.synchronize()
    started = time.perf_counter()
    with sdpa_kernel(DENSE_BACKENDS, set_priority=True):
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False,
            stopping_criteria=StoppingCriteriaList([clock]), **options,
        )  # fmt: skip
    return started, clock


# ---- the prompt ------------------------------------------------------------------------------------------------


def first_token(
    arguments: GenerateArguments, nsa: NSALlamaForCausalLM, dense: NSALlamaForCausalLM, length: int
) -> Entry:
    """A prompt of one row, read after a short one; its time and its memory come from the same run."""
    ids = torch.randint(arguments.vocab_size, (1, length), device=nsa.device)

    def read(ids: Tensor) -> Tensor:
        cache = NSALlamaCache(nsa.config, layout="static", max_length=ids.shape[1])
        for chunk in ids.split(arguments.prefill_chunk, dim=1):
            logits = nsa(chunk, past_key_values=cache, logits_to_keep=1).logits
        return logits

    def read_dense(ids: Tensor) -> Tensor:
        with sdpa_kernel(DENSE_BACKENDS, set_priority=True):
            return dense(ids, use_cache=True, logits_to_keep=1).logits

    runs: dict[str, Callable[[Tensor], object]] = {"NSA": read}
    if length <= arguments.dense_prompt:
        runs["dense"] = read_dense
    ms, gib = {}, {}
    for name, run in runs.items():
        run(ids[:, : 2 * arguments.prefill_chunk])
        _free()
        ms[name], gib[name] = _time_and_peak(partial(run, ids))
    plans = _plans(arguments, length, 1)
    # What the plan says of the same memory: cache and the chunk's activations.
    planned = {
        f"{name}: planned GiB": (sum(p.cache_bytes.values()) + p.prefill_bytes) / 2**30 for name, p in plans.items()
    }
    return Entry(length=length, inputs="batch 1", part="first token", ms=ms, gib=gib, facts=planned)


def _time_and_peak(run: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds and GiB of one run."""
    seconds = []

    def timed() -> None:
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)

    gib = peak_gib(timed)
    return seconds[0] * 1e3, gib


def _plans(arguments: GenerateArguments, length: int, batch: int) -> dict[str, Any]:
    config = configuration(arguments, "nsa")
    plans = plan(config, context=length, batch=batch, chunk=arguments.prefill_chunk, dtype=torch.bfloat16)
    whole = plan(config, context=length, batch=batch, chunk=length, dtype=torch.bfloat16)
    return {"NSA": plans["NSA"], "dense": whole["dense"]}


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()
