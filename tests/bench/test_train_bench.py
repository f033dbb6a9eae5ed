"""`nsa bench train` on a CPU with a tiny model: what it measures, what it reads, what it does without room."""

import math
from dataclasses import replace

import pytest
import torch

from nsa.bench import train
from nsa.bench.arguments import TrainArguments
from nsa.bench.result import Entry, Result
from nsa.bench.show import markdown, tables, write
from nsa.cli import main, parse
from nsa.config import InfLLMv2Config
from nsa.models.loss import ChunkedLoss
from nsa.training.presets import preset
from nsa.training.sizes import model_config, vocabulary

TINY = replace(preset("demo"), hidden_size=32, num_layers=1, intermediate_size=48)
ARGUMENTS = TrainArguments(
    models=("demo",), lengths=(64,), tokens=128, mean_document=16, workers=0, steps=1, repetitions=1, modes=("eager",)
)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(train, "configuration", lambda model: TINY)
    monkeypatch.setattr(train, "CORPUS", 1 << 14)


def test_a_cell_has_times_and_counts_of_every_candidate(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda layers, **options: compiled.append((layers, options)) or layers)
    monkeypatch.setattr(train, "begin_step", lambda: None)
    arguments = replace(ARGUMENTS, modes=("graphs", "compiled", "eager"))
    rows, packed = train.measure(arguments, "cpu")
    labels = [name + mode for name in ("NSA", "dense", "window") for mode in ("", ", no graphs", ", eager")]
    layers = [(part.config.attention, options) for part, options in compiled[::2]]
    graphs = {"mode": "reduce-overhead"}
    assert layers == [(name, options) for name in ("nsa", "dense", "window") for options in (graphs, {})]
    assert all(isinstance(loss, ChunkedLoss) for loss, _ in compiled[1::2])
    for entry, layout in ((rows, "rows"), (packed, "packed")):
        assert (entry.part, entry.inputs, entry.length) == ("demo", layout, 64)
        assert entry.facts["tokens"] == 128
        assert list(entry.ms) == labels
        assert min(entry.ms.values()) > 0
        for label in labels:
            counts = [entry.facts[f"{label}: {what}"] for what in ("launches", "host reads", "graphs")]
            assert counts == [0, 0, 0]  # no device, and nothing was compiled
            assert 0 < entry.facts[f"{label}: waiting"] < 1
    assert rows.facts["documents"] == 2
    assert packed.facts["documents"] > 2


def test_a_step_trains():
    trained = train.Trained(TINY, "nsa", 64, None, "cpu")
    batch = next(train.batches_of(ARGUMENTS, TINY, "packed", 64, pin=False))
    before = [parameter.clone() for parameter in trained.model.parameters()]
    trained.stepper("eager")(batch)
    after = list(trained.model.parameters())
    assert sum(not torch.equal(one, two) for one, two in zip(before, after, strict=True)) > len(before) // 2
    size = sum(parameter.numel() for parameter in after)
    assert trained.resident() == pytest.approx(3 * 4 * size, rel=0.01)  # a weight and its two moments


def test_documents_are_log_normal_and_the_same_for_the_same_seed():
    arguments = replace(ARGUMENTS, tokens=8192, mean_document=64)
    one, two = (next(train.batches_of(arguments, TINY, "packed", 8192, pin=False)) for _ in range(2))
    assert torch.equal(one["input_ids"], two["input_ids"])
    other = next(train.batches_of(replace(arguments, seed=1), TINY, "packed", 8192, pin=False))
    assert not torch.equal(one["position_ids"], other["position_ids"])
    assert one["input_ids"].max() < vocabulary(TINY)
    assert {"cu_seq_lens_q", "max_length_q"} <= set(one)  # no model has to ask the device
    ends = (one["position_ids"][0].diff() < 0).nonzero().flatten()
    lengths = ends.diff().double()
    assert lengths.mean().item() == pytest.approx(64, rel=0.4)
    assert lengths.log().std().item() == pytest.approx(train.SPREAD, rel=0.3)
    assert math.log(64) - 1.0 < lengths.log().mean().item() < math.log(64)  # at mu = log(mean) - SPREAD^2 / 2


def test_models_that_do_not_fit_together_take_turns_and_what_fits_nowhere_is_named(monkeypatch):
    alive, whole = [], train.fits

    def crowded(entry, arguments, attentions, models, device):
        alive.append(sorted(models))
        if len(attentions) > 1 or attentions == ["dense"]:
            models["nsa"] = None
            return False
        return whole(entry, arguments, attentions, models, device)

    monkeypatch.setattr(train, "fits", crowded)
    entry = train.cell(ARGUMENTS, "demo", "rows", 64, {}, "cpu")
    assert alive == [[], [], [], []]
    assert list(entry.ms) == ["NSA, eager", "window, eager"]
    assert entry.facts["dense: out of memory"] == 1


def test_infllm_v2_is_measured_with_the_presets_own_sizes():
    arguments = replace(ARGUMENTS, attentions=("infllm_v2",))
    entry = train.cell(arguments, "demo", "rows", 64, {}, "cpu")
    assert list(entry.ms) == ["InfLLM-V2, eager"]
    assert model_config(TINY, attention="infllm_v2").infllm_v2_config == TINY.infllm_v2 != InfLLMv2Config()


def canned() -> Result:
    """Compiled, dense trains 100,000 tokens a second and NSA 80,000; eager dense half of it."""
    labels = {"NSA": 12.5, "dense": 10.0, "dense, eager": 20.0}
    facts = {"tokens": 1000.0, "documents": 7.0, "window: out of memory": 1.0}
    for place, label in enumerate(labels):
        facts |= {f"{label}: launches": 100.0 + place, f"{label}: host reads": 1.0 * place, f"{label}: graphs": 2.0}
        facts[f"{label}: waiting"] = 0.0125
    entry = Entry(length=500, inputs="packed", part="small", ms=labels, gib={"NSA": 1.5}, facts=facts)
    return Result(bench="train", facts={"device": "a device"}, shape={}, matrix_rate=8e14, entries=[entry])


def test_the_table_has_rates_over_the_fastest_dense_twin_and_says_what_had_no_room(tmp_path):
    (table,) = tables(canned())
    assert table.title == "small: training steps of the same tokens"
    start = ["500", "packed", "7"]
    assert table.rows == [
        [*start, "NSA", "80,000", "0.80", "12.5", "1.50", "100", "0", "2", "1.2%"],
        [*start, "dense", "100,000", "1.00", "10.0", "", "101", "1", "2", "1.2%"],
        [*start, "dense, eager", "50,000", "0.50", "20.0", "", "102", "2", "2", "1.2%"],
        ["500", "packed", "", "window", "out of memory", *[""] * 7],
    ]
    assert len(table.header) == len(table.rows[0])
    assert "| 500 | packed | 7 | NSA | 80,000 | 0.80 |" in markdown(canned())
    write(canned(), tmp_path / "train")
    assert (tmp_path / "train.svg").exists()


def test_the_command_has_its_options_and_one_line_errors(capsys):
    assert parse("bench", ["train", "--models", "small", "--modes", "eager"]).what == TrainArguments(
        models=("small",), modes=("eager",)
    )
    for arguments, message in (
        (["--models"], "--models: expected one or more, got none"),
        (["--lengths", "0"], "--lengths: expected positive numbers of tokens, got [0]"),
        (["--tokens", "0"], "--tokens: expected at least 1, got 0"),
    ):
        assert main(["bench", "train", *arguments]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
