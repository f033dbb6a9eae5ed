"""What would silently give another model than asked for: each stops the run, in one line, and nothing good is lost."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from runs import At, interrupt, poison, tiny
from safetensors.torch import load_file, save_file

from nsa.training.folder import CHECKPOINT_FILES, checkpoints
from nsa.training.lock import claimed
from nsa.training.train import train

pytestmark = pytest.mark.filterwarnings("default")  # the Trainer's own


@pytest.mark.parametrize(
    ("step", "eval_every", "message"),
    [
        (5, 4, r"^loss is nan at step 6: training has diverged and was stopped; the last good checkpoint is .*-4$"),
        (8, 4, r"^eval_text_loss is nan at step 8: .*; the last good checkpoint is .*-4$"),
        (8, 0, r"^a weight is NaN or infinite at step 8: .*; the last good checkpoint is .*-4$"),
        (2, 0, r"^loss is nan at step 4: .*; no checkpoint was written before$"),
    ],
)
def test_a_model_that_became_nan_stops_before_the_next_checkpoint_and_leaves_the_last_good_one(
    config, step, eval_every, message
):
    with pytest.raises(ValueError, match=message) as caught:
        train(replace(config, eval_every=eval_every), callbacks=[At(step, poison)])
    assert "\n" not in str(caught.value)
    assert [folder.name for folder in checkpoints(config.out)] == (["checkpoint-4"] if step > 4 else [])
    for folder in checkpoints(config.out):
        assert all(tensor.isfinite().all() for tensor in load_file(folder / "model.safetensors").values())
    losses = [json.loads(line).get("loss") for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    assert 0.0 not in losses
    assert not (config.out / "model.safetensors").exists()


def test_a_final_model_that_is_nan_is_not_saved(config):
    config = replace(config, save_every=0, log_every=100, eval_every=0)
    with pytest.raises(ValueError, match="is NaN or infinite at step 12"):
        train(config, callbacks=[At(12, poison)])
    assert not (config.out / "model.safetensors").exists()


@pytest.fixture(scope="module")
def stopped(text, tmp_path_factory):
    """A run that was stopped at step 6, with a checkpoint of step 4."""
    config = tiny(text, tmp_path_factory.mktemp("stopped"))
    with pytest.raises(KeyboardInterrupt):
        train(config, callbacks=[At(6, interrupt)])
    return config


@pytest.fixture
def again(stopped, tmp_path):
    """A copy of it, to be damaged and continued."""
    shutil.copytree(stopped.out, tmp_path / "run")
    return replace(stopped, out=tmp_path / "run", resume=True)


def refused(config, message):
    before = [path.name for path in checkpoints(config.out)]
    with pytest.raises(ValueError, match=message) as caught:
        train(config)
    assert "\n" not in str(caught.value)
    assert [path.name for path in checkpoints(config.out)] == before


@pytest.mark.parametrize("name", CHECKPOINT_FILES)
def test_a_checkpoint_without_one_of_its_parts_is_not_continued(again, name):
    (again.out / "checkpoint-4" / name).unlink()
    refused(again, rf"checkpoint-4 lacks {name}; remove checkpoint-4")


@pytest.mark.parametrize("name", CHECKPOINT_FILES)
def test_nor_is_one_with_a_damaged_part(again, name):
    path = again.out / "checkpoint-4" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused(again, r"checkpoint-4.* (cannot be read|is damaged)")


def test_nor_one_with_weights_of_other_names(again):
    path = again.out / "checkpoint-4" / "model.safetensors"
    save_file({f"other.{name}": tensor for name, tensor in load_file(path).items()}, path)
    refused(again, "its weights are not this model's")


def test_nor_one_of_another_step(again):
    (again.out / "checkpoint-4").rename(again.out / "checkpoint-5")
    refused(again, "checkpoint-5 is the checkpoint of step 4")


def test_a_run_is_not_continued_over_other_data(again, tmp_path):
    other = tmp_path / "code.txt"
    other.write_text(Path(again.data).read_text().replace("return x + 7", "return x + 8"))
    config = json.loads((again.out / "train_config.json").read_text())
    (again.out / "train_config.json").write_text(json.dumps(config | {"data": str(other)}))
    refused(replace(again, data=str(other)), "--resume: the data of .* changed since it was started")


@pytest.mark.parametrize("damage", ["", "[]", "{}"])
def test_nor_is_one_whose_data_cannot_be_compared(again, damage):
    (again.out / "data.json").write_text(damage)
    refused(again, "data.json does not say what the run's data was")


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"nsa": 3}', "nothing"])
def test_a_run_whose_configuration_is_damaged_is_not_continued(again, damage):
    (again.out / "train_config.json").write_text(damage)
    refused(again, "train_config.json is not the configuration of a run")


def test_metrics_lose_a_torn_last_line_and_nothing_else(again):
    path = again.out / "metrics.jsonl"
    kept = path.read_text()
    path.write_text(kept + '{"step": 6, "sec')
    train(again)
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == sorted(steps)
    assert steps[-1] == 12
    refused(again, "has come to its end; nothing is left to do")


def test_metrics_that_are_no_runs_are_refused(again):
    (again.out / "metrics.jsonl").write_text("a shopping list\nmilk\n")
    refused(again, "metrics.jsonl, line 1: not a record of a run")


def test_two_runs_do_not_mix_in_one_folder(again):
    with claimed(again.out):
        refused(again, "another run is at work in this folder")
    with claimed(again.out):  # it is free again
        pass


def test_a_users_files_are_not_written_over(config):
    config.out.mkdir()
    for name in ("config.json", "notes.txt"):
        (config.out / name).write_text("mine")
    with pytest.raises(ValueError, match=r"holds files that are not a run's \(config.json, notes.txt\)"):
        train(config)
    assert {path.name: path.read_text() for path in config.out.iterdir() if path.name != ".lock"} == {
        "config.json": "mine",
        "notes.txt": "mine",
    }


def test_a_file_is_no_runs_folder(config):
    config.out.write_text("mine")
    with pytest.raises(ValueError, match="run is a file; expected a folder as --out"):
        train(config)


def test_a_run_that_fails_before_its_first_step_leaves_a_folder_to_begin_again_in(config):
    def fails(config, tokenizer):
        raise ValueError("no such layers")

    with pytest.raises(ValueError, match="no such layers"):
        train(config, make=fails)
    train(replace(config, curriculum=("32x1",)))
    assert (config.out / "model.safetensors").exists()


def test_flags_of_several_processes_are_refused_where_one_was_started(config):
    with pytest.raises(
        ValueError, match=r"--cp 2 --tp 1 need a multiple of 2 processes, got 1; start them with torchrun"
    ):
        train(replace(config, cp=2))
    assert not config.out.exists()
