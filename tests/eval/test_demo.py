"""`nsa demo` with a recipe of a few steps: what it writes, and that nothing trained is ever lost."""

import contextlib
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from few_questions import few
from rich.console import Console
from safetensors.torch import load_file

from nsa.config import NSAConfig
from nsa.eval import demo, demo_work, pictures, twins, workers
from nsa.eval.arguments import DemoArguments
from nsa.training.config import TrainConfig
from nsa.training.folder import is_trained

TWINS = ("nsa", "dense", "window")


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory) -> tuple[Path, str]:
    """The folder of one demo that ran to its end, and what it printed."""
    out = tmp_path_factory.mktemp("demo") / "out"
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        shrink(patch, text)
        demo.demo(DemoArguments(output=out, processes=1))
    return out, printed.getvalue()


@pytest.fixture
def tiny(text, tmp_path, monkeypatch) -> Path:
    """The tiny demo whose training is pretended and whose judging is stopped; the folder for its results."""
    shrink(monkeypatch, text)
    monkeypatch.setattr(demo_work, "train", pretend_to_train)
    monkeypatch.setattr(demo_work, "judge_twin", stop)
    return tmp_path / "out"


def shrink(patch: pytest.MonkeyPatch, text: str) -> None:
    """Tiny models, a few steps, a few questions."""
    nsa = NSAConfig(
        compress_block_size=8, compress_stride=4, select_block_size=8, num_selected_blocks=3, window_size=24
    )
    config = TrainConfig(
        data=text, curriculum=("64x2:retrieval=0.5", "128x2"), batch_tokens=128, hidden_size=16, num_layers=2,
        num_heads=2, num_kv_heads=1, intermediate_size=16, nsa=nsa, eval_every=2, eval_tokens=256, log_every=1,
        device="cpu", quiet=True,
    )  # fmt: skip
    patch.setattr(demo, "preset", lambda name: config)
    patch.setattr(demo_work, "tasks_for", few)
    patch.setattr(pictures, "SAMPLE_TOKENS", 4)


def pretend_to_train(config: TrainConfig) -> None:
    config.out.mkdir(parents=True, exist_ok=True)
    config.save(config.out)
    (config.out / "model.safetensors").write_text(f"weights of {config.attention} from seed {config.seed}")


def stop(*_, **__) -> None:
    raise KeyboardInterrupt


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_the_demo_trains_judges_and_reports(finished):
    out, printed = finished
    for words in ("1/3 nsa: training 4 steps", "held-out", "recall", "NSA goes on after", "report.html"):
        assert words in printed
    summary = json.loads((out / "demo.json").read_text(encoding="utf-8"))
    assert tuple(summary["table"]) == TWINS
    row = summary["table"]["nsa"]
    assert set(row["recall"]) == {"inside the window", "beyond the window", "beyond the stacked windows"}
    assert row["seconds_per_step"] > 0
    assert row["loss_error"] > 0
    assert [summary["table"][twin]["keys_per_query"] for twin in ("dense", "window")] == [128, 24]
    assert summary["table"]["dense"]["difference"] == 0.0
    html = (out / "report.html").read_text(encoding="utf-8")
    for section in ("results", "context", "needle", "curves", "blocks", "keys", "sample", "run"):
        assert f'<section id="{section}">' in html
    assert "://" not in html


def test_a_second_demo_shows_the_results_and_changes_nothing(finished, text, monkeypatch, capsys):
    out, _ = finished
    shrink(monkeypatch, text)
    before = contents(out)
    demo.demo(DemoArguments(output=out))
    printed = capsys.readouterr().out
    assert "there already; --overwrite" in printed
    assert "held-out" in printed
    assert contents(out) == before


def test_other_settings_are_refused_in_one_line(finished, text, monkeypatch):
    out, _ = finished
    shrink(monkeypatch, text)
    before = contents(out)
    with pytest.raises(ValueError, match=r"trained with other settings \(seed: 0, now 1\); give another") as error:
        demo.demo(DemoArguments(output=out, seed=1))
    assert "\n" not in str(error.value)
    assert contents(out) == before


def test_finished_twins_are_kept_when_the_demo_was_stopped(tiny, monkeypatch):
    trained = []

    def train(config: TrainConfig) -> None:
        if config.attention == "window" and len(trained) == 2:
            trained.append("stopped")
            raise KeyboardInterrupt
        trained.append(config.attention)
        pretend_to_train(config)

    monkeypatch.setattr(demo_work, "train", train)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt, match="the same command goes on where it was"):
            demo.demo(DemoArguments(output=tiny, processes=1))
    assert trained == ["nsa", "dense", "stopped", "window"]


def test_a_twin_that_was_stopped_goes_on_from_its_checkpoint(tiny, monkeypatch, capsys):
    calls = []

    def train(config: TrainConfig) -> None:
        calls.append((config.attention, config.resume))
        if len(calls) == 1:
            (config.out / "checkpoint-2").mkdir(parents=True)
            raise KeyboardInterrupt
        pretend_to_train(config)

    monkeypatch.setattr(demo_work, "train", train)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            demo.demo(DemoArguments(output=tiny, processes=1))
    assert calls == [("nsa", False), ("nsa", True), ("dense", False), ("window", False)]
    assert "training 4 steps, going on from checkpoint-2" in capsys.readouterr().out


def test_processes_of_their_own_do_the_same_work(finished, text, tmp_path, monkeypatch):
    """The same weights and the same answers, up to the rounding of sums over another number of threads."""
    shrink(monkeypatch, text)
    monkeypatch.setattr(twins, "WORK", "few_questions")
    monkeypatch.setattr(twins, "start_server", lambda _: workers.start_server(demo_work.__name__))
    out, _ = finished
    recipes = {twin: demo.recipe(tmp_path, twin, steps=None, seed=0) for twin in TWINS}
    rows = twins.train_and_judge(recipes, 2, Console(file=io.StringIO()))
    for twin in TWINS:
        name = f"{twin}/model.safetensors"
        torch.testing.assert_close(load_file(tmp_path / name), load_file(out / name))
        here = demo_work.judge_twin(twin, recipes[twin], quiet=True)
        assert [(row["where"], row["n"]) for row in rows[twin]] == [(row["where"], row["n"]) for row in here]
        for row, expected in zip(rows[twin], here, strict=True):
            assert row["values"] == pytest.approx(expected["values"], rel=1e-5)


def test_a_twin_that_fails_in_its_process_says_why(text, tmp_path, monkeypatch):
    shrink(monkeypatch, text)
    recipes = {twin: demo.recipe(tmp_path, twin, steps=None, seed=0) for twin in ("nsa", "dense")}
    recipes["dense"] = replace(recipes["dense"], data=str(tmp_path / "missing"))
    with pytest.raises((ValueError, OSError), match="missing"):
        twins.train_and_judge(recipes, 2, Console(file=io.StringIO()))
    assert not is_trained(recipes["dense"].out)


def test_the_command_itself_waits_for_neither_torch_nor_transformers():
    loaded = "import sys, nsa.eval.demo; print({'torch', 'transformers'} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "set()"


def test_overwrite_starts_again_and_leaves_other_files(tiny):
    for seed in (0, 1):
        with pytest.raises(KeyboardInterrupt):
            demo.demo(DemoArguments(output=tiny, processes=1, seed=seed, overwrite=seed == 1))
        (tiny / "mine.txt").write_text("kept", encoding="utf-8")
    assert (tiny / "nsa" / "model.safetensors").read_text() == "weights of nsa from seed 1"
    assert (tiny / "mine.txt").read_text(encoding="utf-8") == "kept"


def test_a_negative_number_of_processes_is_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match=r"--processes should be 0 .* or more, got -1"):
        demo.demo(DemoArguments(output=tmp_path / "out", processes=-1))
    assert not (tmp_path / "out").exists()


def test_steps_shorten_every_stage_alike(tmp_path):
    whole = demo.recipe(tmp_path, "nsa", steps=None, seed=0)
    half = demo.recipe(tmp_path, "nsa", steps=whole.total_steps // 2, seed=0)
    assert [stage.length for stage in half.stages] == [stage.length for stage in whole.stages]
    for short, long in zip(half.stages, whole.stages, strict=True):
        assert abs(short.steps - long.steps / 2) <= 1
    with pytest.raises(ValueError, match="--steps should be at least 1, got 0"):
        demo.recipe(tmp_path, "nsa", steps=0, seed=0)


def test_twins_differ_in_their_attention_only(tmp_path):
    first, *others = (demo.recipe(tmp_path, twin, steps=None, seed=3) for twin in TWINS)
    assert all(replace(other, out=first.out, attention=first.attention) == first for other in others)
