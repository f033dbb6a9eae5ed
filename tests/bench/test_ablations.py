"""Every row of the ablations is a configuration that `nsa train` takes, and no two are the same."""

import importlib.util
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
    assert config.total_steps == 3200  # as many tokens as any other
    assert config.batch_tokens == 32768


def test_no_two_rows_are_the_same_run():
    found = [configuration(row) for row in ablations.ROWS]
    assert all(one != other for i, one in enumerate(found) for other in found[:i])


def test_the_table_has_runs_that_have_only_begun(tmp_path):
    for name, text in (("a", ""), ("b", '{"tokens": 64.0}\n{"eval_text_loss": 2.5}\n{"tok')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(text)
    assert ablations.table(tmp_path).splitlines()[2:] == ["| a |  |  |  |  |", "| b | 64 | 2.5000 |  |  |"]
