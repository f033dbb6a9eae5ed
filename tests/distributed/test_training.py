"""`nsa train` by several processes gives what one gives; where one of them fails, all end, with one line."""

import json
import os
import shlex
import subprocess
import sys
from datetime import timedelta

import processes
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.checkpoint.api import CheckpointException

from nsa.training.config import TrainConfig
from nsa.training.folder import checkpoints
from nsa.training.world import _agree, mesh_shape
from nsa.training.writing import in_pieces

FLAGS = shlex.split(
    "--preset demo --data code.txt --cache-dir cache --curriculum 32x4:repeated=0.5 64x4:retrieval=0.5 "
    "--batch-tokens 64 --accumulation 2 --hidden-size 32 --num-layers 1 --num-heads 2 --num-kv-heads 2 "
    "--intermediate-size 32 --eval-every 4 --eval-tokens 128 --save-every 2 --keep-checkpoints 0 --log-every 1 "
    "--device cpu --no-compile --quiet"
)


def one(name, ranks, *more, out=None, **what):
    return {"name": name, "ranks": ranks, "arguments": [*FLAGS, "--out", out or name, *more], **what}


OTHER_DATA = json.dumps({"data": "another", "tokenizer": "another"})
SELECTOR = shlex.split(  # 16 queries at random places among a batch's 64, with several blocks to choose from
    "--selector-loss 5 --selector-queries 16 --nsa.compress-block-size 4 --nsa.select-block-size 4"
)
RUNS = [
    one("alone", 1),
    one("halves", 2, kill=[1, 5]),
    one("continued-by-four", 4, "--resume", "--cp", "2", "--dp-replicate", "2", copy=["halves", "continued-by-four"]),
    one("continued-by-one", 1, "--resume", copy=["halves", "continued-by-one"]),
    one("nan", 2, "--cp", "2", poison=[1, 5]),
    one("flags", 2, "--cp", "3"),
    one("batches", 2, "--accumulation", "3"),
    one("other-flags", 2, of_rank={"1": ["--hidden-size", "64"]}),
    one("stopped", 1, kill=[0, 5]),
    one("other-layout", 2, "--resume", copy=["stopped", "other-layout"]),
    one("heads", 2, "--tp", "2"),
    one("ctrl-c", 2, "--cp", "2", "--gather-once", interrupt=[1, 5]),
    one("other-data", 2, "--resume", copy=["halves", "other-data"], write=["other-data/data.json", OTHER_DATA]),
    one("drawn-alone", 1, *SELECTOR),
    one("drawn", 2, *SELECTOR, kill=[1, 5]),
    one("drawn-on", 2, "--resume", *SELECTOR, copy=["drawn", "drawn-on"]),
    one("torn", 2, "--resume", copy=["halves", "torn"], write=["torn/checkpoint-4/shards/__1_0.distcp", ""]),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    (folder / "code.txt").write_text("".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(300)))
    return folder


@pytest.fixture(scope="module")
def results(folder):
    return processes.run(RUNS, folder)


def records(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    names = ("step", "loss", "grad_norm", "eval_text_loss", "eval_retrieval_loss")
    return [{name: record[name] for name in names if name in record} for record in map(json.loads, lines)]


def assert_same_curve(run, other):
    got, wanted = records(run), records(other)
    assert [list(record) for record in got] == [list(record) for record in wanted]
    values = (
        torch.tensor([list(record.values()) for record in all_of if len(record) == 3]) for all_of in (got, wanted)
    )
    torch.testing.assert_close(*values)
    evaluations = (torch.tensor([list(x.values()) for x in all_of if len(x) == 2]) for all_of in (got, wanted))
    torch.testing.assert_close(*evaluations)


def one_line_of(results, name):
    """What the ranks said, which is one line of one of them; all failed."""
    assert all(rank["code"] != 0 for rank in results[name]), results[name]
    said = [line for rank in results[name] for line in rank["said"].splitlines() if line.strip()]
    assert len(said) == 1, results[name]
    return said[0]


def test_a_run_goes_on_by_another_number_of_processes_as_if_one_had_done_it_all(results, folder):
    for name in ("continued-by-four", "continued-by-one"):
        assert [rank["code"] for rank in results[name]] == [0] * len(results[name]), results[name]
        assert_same_curve(folder / name, folder / "alone")
        got, wanted = (load_file(folder / run / "model.safetensors") for run in (name, "alone"))
        torch.testing.assert_close(got, wanted)


def test_the_selectors_loss_looks_at_the_same_random_queries_however_many_processes_and_after_a_stop(results, folder):
    assert [rank["code"] for rank in results["drawn-on"]] == [0, 0], results["drawn-on"]
    assert_same_curve(folder / "drawn-on", folder / "drawn-alone")
    got, wanted = (load_file(folder / run / "model.safetensors") for run in ("drawn-on", "drawn-alone"))
    torch.testing.assert_close(got, wanted)


def test_ranks_that_share_heads_train_as_one_process(results, folder):
    assert [rank["code"] for rank in results["heads"]] == [0, 0], results["heads"]
    assert_same_curve(folder / "heads", folder / "alone")


def test_a_killed_rank_ends_the_run_with_one_line_and_leaves_the_last_checkpoint_whole(results, folder):
    codes = [rank["code"] for rank in results["halves"]]
    assert codes == [2, -9], results["halves"]
    said = results["halves"][0]["said"].strip()
    assert said.startswith("nsa train: error: rank 0 lost another process of this run; ")
    assert said.endswith("checkpoint-4 is whole, continue with --resume")
    assert "\n" not in said
    assert [path.name for path in checkpoints(folder / "halves")] == ["checkpoint-2", "checkpoint-4"]
    assert not (folder / "halves" / "model.safetensors").exists()


def test_weights_of_one_rank_that_are_nan_end_all_before_the_next_checkpoint(results, folder):
    assert "training has diverged and was stopped" in one_line_of(results, "nan")
    assert checkpoints(folder / "nan")[-1].name == "checkpoint-4"


def test_ctrl_c_at_one_rank_ends_all_after_the_step_at_hand_with_a_checkpoint_and_one_line(results, folder):
    assert [rank["code"] for rank in results["ctrl-c"]] == [130, 130], results["ctrl-c"]
    said = one_line_of(results, "ctrl-c")
    assert said.endswith("stopped at step 6; continue from ctrl-c/checkpoint-6 with --resume"), said
    assert checkpoints(folder / "ctrl-c")[-1].name == "checkpoint-6"  # the signal came when step 5 was over


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flags", "--dp-replicate 1 --dp-shard any --cp 3 --tp 1 need a multiple of 3 processes, got 2"),
        ("batches", "--accumulation: a step's forward passes are divided among 2 ranks of data parallelism"),
        ("other-flags", "rank 1 was started with another configuration than rank 0 (hidden_size: 64, there 32)"),
        ("other-layout", "checkpoint-4 was written by one process, which alone continues it: without torchrun"),
        ("other-data", "--resume: the data and the tokenizer of other-data changed since it was started"),
        ("torn", "--resume: torn/checkpoint-4 cannot be read (EOFError); remove it to continue from one before it"),
    ],
)
def test_what_does_not_fit_is_one_line_of_one_rank(results, name, message):
    assert message in one_line_of(results, name)


def test_what_a_rank_could_not_write_of_a_checkpoint_in_pieces_is_one_error_that_says_why():
    failures = {1: (OSError(28, "No space left on device"), None)}
    with pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device$"), in_pieces():
        raise CheckpointException("write", failures)


def test_who_keeps_the_store_ends_no_sooner_than_the_others_have_heard_why():
    store, args = dist.HashStore(), (2, "flags", {"a": 1}, lambda theirs, own: "another")
    store.set_timeout(timedelta(milliseconds=1))
    store.set("flags/1", json.dumps({"a": 2}))
    with pytest.raises(dist.DistStoreError):
        _agree(store, 0, *args)
    with pytest.raises(SystemExit):
        _agree(store, 1, *args)
    store.set("flags/1", json.dumps({"a": 2}))
    with pytest.raises(ValueError, match=r"^rank 1 was started with another$"):
        _agree(store, 0, *args)


def test_rows_shorter_than_the_shards_are_one_line():
    config = TrainConfig(cp=8, curriculum=("8x1", "64x1"))
    with pytest.raises(ValueError, match=r"^--cp: each rank holds two chunks .* rows of 16 tokens or more, got .* 8$"):
        mesh_shape(config, 8)


def test_layers_whose_heads_are_shared_are_not_compiled():
    with pytest.raises(ValueError, match=r"^--compile: .* expected --tp 1, or --no-compile, got --tp 2$"):
        mesh_shape(TrainConfig(compile=True, tp=2), 2)


def test_torchrun_with_sequences_shared_by_two_gives_the_losses_of_one_process(results, folder):
    launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "nsa", "train", *FLAGS, "--cp", "2", "--out", "torchrun"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    finished = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("The model lies in") == 1
    assert_same_curve(folder / "torchrun", folder / "alone")
