"""Every row of the ablations is a configuration that `nsa train` takes, and no two are the same."""

import importlib.util
import subprocess
from pathlib import Path

import pytest
import tyro

from nsa.commands.train import default_for
from nsa.training.config import TrainConfig

SPEC = importlib.util.spec_from_file_location("ablations", Path(__file__).parents[2] / "benchmarks" / "ablations.py")
ablations = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(ablations)


def configuration(row):
    given = ablations.flags_of(row)
    config = tyro.cli(TrainConfig, args=given, default=default_for(given))
    config.validate()
    return config


@pytest.mark.parametrize("row", ablations.ROWS)
def test_nsa_train_takes_the_flags_of_a_row(row):
    config = configuration(row)
    tokens = sum(stage.steps * max(stage.length, config.batch_tokens) for stage in config.stages)
    assert tokens == 3200 * 32768  # as many as any other


def test_no_two_rows_are_the_same_run():
    found = [configuration(row) for row in ablations.ROWS]
    assert all(one != other for i, one in enumerate(found) for other in found[:i])


def test_the_table_has_runs_that_have_only_begun(tmp_path):
    for name, text in (("a", ""), ("b", '{"tokens": 64.0}\n{"eval_text_loss": 2.5}\n{"tok')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(text)
    assert ablations.table(tmp_path).splitlines()[2:] == ["| a |  |  |  |  |", "| b | 64 | 2.5000 |  |  |"]


def test_a_finished_run_is_left_alone_a_stopped_one_goes_on_and_a_refused_one_ends_it(tmp_path, monkeypatch):
    (tmp_path / "dense-seed0").mkdir()
    (tmp_path / "dense-seed0" / "model.safetensors").touch()
    (tmp_path / "window-seed0" / "checkpoint-20").mkdir(parents=True)
    asked, codes = [], [0, 2]

    def run(words):
        asked.append(words)
        return subprocess.CompletedProcess(words, codes[len(asked) - 1])

    monkeypatch.setattr(ablations.subprocess, "run", run)
    rows = ["dense", "window", "nsa", "nsa-shared"]
    monkeypatch.setattr("sys.argv", ["ablations.py", "--out", str(tmp_path), "--rows", *rows])
    with pytest.raises(SystemExit, match="2"):
        ablations.main()
    outs = [Path(words[words.index("--out") + 1]).name for words in asked]
    assert outs == ["window-seed0", "nsa-seed0"]
    assert ["--resume" in words for words in asked] == [True, False]
