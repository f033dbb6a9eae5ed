"""`nsa bench generate`: its dense decoder is the dense model, its filled caches decode, its result has rates."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend
from transformers.cache_utils import DynamicCache

from nsa.bench import dense_decoding, generate
from nsa.bench.arguments import GenerateArguments
from nsa.bench.dense_decoding import DenseDecoder
from nsa.bench.generate import Clock, filled_cache, filled_dense_cache, random_model, whole_generation
from nsa.bench.result import Entry, Result
from nsa.bench.show import markdown, tables, write
from nsa.cli import main, parse
from nsa.models.captured_step import CapturedStep

SMALL = GenerateArguments(
    layers=2, hidden_size=32, heads=4, kv_heads=2, head_dim=8, intermediate_size=48, vocab_size=64
)


@pytest.mark.parametrize("shares_by_flag", [False, True])
def test_the_dense_decoder_is_the_dense_model(shares_by_flag, monkeypatch):
    model = random_model(SMALL, "dense", "cpu").float()
    decoder = DenseDecoder(model, 3, 40, SDPBackend.MATH, capture=False)
    if shares_by_flag:  # as for cuDNN, which there is none of on a CPU
        decoder.backend = SDPBackend.CUDNN_ATTENTION
        monkeypatch.setattr(dense_decoding, "sdpa_kernel", lambda backend: nullcontext())
    cache = DynamicCache(config=model.config)
    for layer, (k, v) in enumerate(decoder.keys_and_values):
        cache.update(k[:, :, :-1].clone(), v[:, :, :-1].clone(), layer)
    ids = torch.randint(64, (3, 1))
    with torch.no_grad():
        expected = model(ids, past_key_values=cache).logits
    torch.testing.assert_close(decoder(ids), expected)
    torch.testing.assert_close(decoder(ids), expected)  # again at the same length


def test_a_filled_cache_is_full_of_finite_numbers_and_decodes():
    model = random_model(SMALL, "nsa", "cpu")
    with torch.no_grad():
        cache = filled_cache(model, 3, 200, 8)
        decoder = CapturedStep(model, cache, masked=False, capture=False)
        for _ in range(8):
            assert decoder(torch.randint(64, (3, 1))).isfinite().all()
    assert [layer.lengths for layer in cache.caches] == [[208] * 3] * 2


def test_generate_is_timed_between_tokens_once_its_steps_are_captured(monkeypatch):
    def generated(model, batch, length, new_tokens, **options):
        clock = Clock()
        clock.times = [1.5, 4.0, 5.0, 5.5, 6.25, 6.75] if length == 2000 else [9.0]
        return 1.0, clock

    monkeypatch.setattr(generate, "_generate", generated)
    entry = whole_generation(SMALL, None, None, 2000, 3)
    assert entry.ms == {"NSA": 500.0, "dense, transformers": 500.0}  # of 500, 750 and 500
    facts = {name.removeprefix("NSA: "): value for name, value in entry.facts.items() if name.startswith("NSA: ")}
    bytes_read = facts.pop("bytes")
    assert facts == {"first token, s": 0.5, "second and third token, ms": 3500.0, "all tokens, s": 5.75}
    assert bytes_read > 0


@pytest.mark.parametrize("room", [None, 5])
def test_filled_caches_of_the_dense_model_decode_over_all_their_tokens(room):
    model = random_model(SMALL, "dense", "cpu").float()
    cache = filled_dense_cache(model, 3, 40, room)
    keys = [layer.keys[:, :, :40].clone() for layer in cache.layers]
    whole = DynamicCache(config=model.config)
    for layer, k in enumerate(keys):
        whole.update(k, cache.layers[layer].values[:, :, :40].clone(), layer)
    ids = torch.randint(64, (3, 1))
    with torch.no_grad():
        found, expected = (model(ids, past_key_values=one, use_cache=True).logits for one in (cache, whole))
    torch.testing.assert_close(found, expected)
    assert int(cache.get_seq_length()) == 41


def canned() -> Result:
    """At 8k and batch 2 NSA takes 4 ms a step, dense 12 and 16; 8e9 and 24e9 bytes."""
    facts = {"rows": 2.0, "NSA: bytes": 8e9, "dense: bytes": 24e9}
    entries = [
        Entry(length=8192, inputs="batch 1", part="first token", ms={"NSA": 50.0, "dense": 100.0},
              gib={"NSA": 1.5, "dense": 2.5}, facts={"NSA: planned GiB": 1.75}),
        Entry(length=8192, inputs="batch 2", part="decoding step",
              ms={"NSA": 4.0, "dense, cuDNN": 12.0, "dense, transformers": 16.0}, facts=facts),
    ]  # fmt: skip
    return Result(bench="generate", facts={"device": "a device"}, shape={}, matrix_rate=8e14, entries=entries)


def test_tables_hold_tokens_a_second_and_bytes_over_time(tmp_path):
    found = {table.title.split(":")[0].split(";")[0]: table for table in tables(canned())}
    rates = found["tokens a second"]
    assert rates.header == [
        "tokens", "inputs", "part", "NSA", "dense, cuDNN", "dense, transformers", "NSA, TB/s", "dense, TB/s",
    ]  # fmt: skip
    assert rates.rows == [["8,192", "batch 2", "decoding step", "500.0", "166.7", "125.0", "2.00", "2.00"]]
    assert found["decoding step"].rows == [["8,192", "batch 2", "4.00", "12.0 (3.00x)", "16.0 (4.00x)"]]
    assert "| 8,192 | batch 1 | 50.0 | 100.0 (2.00x) |" in markdown(canned())
    write(canned(), tmp_path / "generate")
    assert (tmp_path / "generate.svg").exists()


def test_the_memory_table_names_what_it_is_of_and_what_was_planned():
    memory = next(table for table in tables(canned()) if table.title.startswith("peak memory"))
    assert memory.title == "peak memory, first token, on top of inputs and weights: GiB"
    assert memory.header == ["tokens", "inputs", "NSA", "dense", "NSA, planned"]
    assert memory.rows == [["8,192", "batch 1", "1.50", "2.50", "1.75"]]


def test_the_command_has_its_options_and_one_line_errors(capsys):
    assert parse("bench", ["generate", "--batches", "2", "--lengths", "8"]).what == replace(
        GenerateArguments(), batches=(2,), lengths=(8,)
    )
    for arguments in (["--batches", "0"], ["--new-tokens", "3"], ["--lengths", "0"]):
        assert main(["bench", "generate", *arguments]) == 2
        said = capsys.readouterr().err
        assert "expected" in said
        assert said.count("\n") == 1
