"""Training runs: resumed equals uninterrupted, checkpoints are whole whatever happens, faults are one line."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import At, interrupt
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import nsa.training.train as module
from nsa.training import compiling, prepare
from nsa.training.config import differences
from nsa.training.curriculum import parse_curriculum
from nsa.training.folder import checkpoints
from nsa.training.presets import PRESETS, preset
from nsa.training.train import train

pytestmark = pytest.mark.filterwarnings("default")  # the Trainer's own


MEASURED = ("seconds", "tokens_per_second", "data_wait")  # another time in every run


def weights(folder):
    return load_file(folder / "model.safetensors")


def records(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in MEASURED} for line in lines]


@pytest.mark.parametrize(
    ("attention", "selector_loss"), [("nsa", 0.0), ("nsa", 0.5), ("infllm_v2", 0.0), ("dense", 0.0), ("window", 0.0)]
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(config, attention, selector_loss):
    config = replace(config, attention=attention, selector_loss=selector_loss)
    whole = replace(config, out=config.out / "whole")
    model = train(whole)
    assert not any(getattr(layer, "selector_weight", 0.0) for layer in model.modules())  # who trains it on says it
    stopped = replace(config, out=config.out / "stopped")
    with pytest.raises(KeyboardInterrupt, match=r"stopped at step 7; continue from .*checkpoint-4 with --resume"):
        train(stopped, callbacks=[At(7, interrupt)])
    train(replace(stopped, resume=True))
    expected, got = weights(whole.out), weights(stopped.out)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert records(whole.out) == records(stopped.out)


def test_a_finished_run_is_a_model_with_tokenizer_metrics_and_configuration(config):
    train(config)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(config.out), AutoTokenizer.from_pretrained(config.out)
    assert model.config.attention == "nsa"
    assert model.config.nsa_config == config.nsa
    assert tokenizer.decode(tokenizer.encode("def é\n", add_special_tokens=False)) == "def é\n"
    assert json.loads((config.out / "train_config.json").read_text()) == config.to_dict()
    rows = list(csv.DictReader((config.out / "metrics.csv").read_text().splitlines()))
    losses = [float(row["loss"]) for row in rows if row["loss"]]
    assert losses[-1] < losses[0]
    assert [int(row["step"]) for row in rows if row["eval_text_loss"]] == [4, 8, 12]
    assert [path.name for path in checkpoints(config.out)] == ["checkpoint-8", "checkpoint-12"]
    assert not list(config.out.glob(".partial"))


def test_gradient_checkpointing_and_accumulation_leave_the_loss_as_it_is(config):
    train(replace(config, out=config.out / "plain"))
    train(replace(config, out=config.out / "checkpointed", gradient_checkpointing=True))
    plain, checkpointed = records(config.out / "plain"), records(config.out / "checkpointed")
    assert [r.get("loss") for r in plain] == [r.get("loss") for r in checkpointed]


def test_the_flat_layout_a_bpe_and_bfloat16_train(config):
    train(replace(config, layout="flat", tokenizer="bpe", vocab_size=300, dtype="bfloat16", accumulation=2))
    assert len(AutoTokenizer.from_pretrained(config.out)) <= 300


def test_twins_start_from_the_same_weights_and_read_the_same_batches(config):
    models = {}
    for attention in ("nsa", "infllm_v2", "dense", "window"):
        one = replace(config, attention=attention)
        tokenizer = prepare.byte_tokenizer()
        models[attention] = prepare.make_model(one, tokenizer).state_dict()
    for twin in ("window", "infllm_v2"):
        assert models[twin].keys() == models["dense"].keys()
        assert all(torch.equal(models["dense"][name], models[twin][name]) for name in models["dense"])


def test_compiling_where_no_compiler_is_found_is_one_clear_line(config, monkeypatch):
    model = prepare.make_model(config, prepare.byte_tokenizer())
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"^--compile: on a CPU it needs a C\+\+ compiler, found none of "):
        compiling.compile_parts(model, on_cpu=True, cuda_graphs=True)


def test_a_run_that_compiles_says_why_its_first_step_takes_so_long(config, monkeypatch, capsys):
    monkeypatch.setattr(module, "compile_parts", lambda model, **options: None)
    for compile in (True, False):
        train(replace(config, out=config.out / str(compile), compile=compile))
        assert ("nsa train: torch.compile: the first step" in capsys.readouterr().err) == compile


DRIVER = """
import resource, sys
import nsa.training.train as module
from nsa.training import compiling, prepare
from transformers import TrainerCallback

class Say(TrainerCallback):
    def on_save(self, *args, **kwargs):
        if {full_disk}:  # from here on no file may grow past 20 kB
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        print("saved", flush=True)

train = module.train
module.train = lambda config: train(config, callbacks=[Say()])
from nsa.cli import main
sys.exit(main(sys.argv[1:]))
"""


def start(config, *, full_disk):
    """`nsa train` in a process of its own that says when a checkpoint is there."""
    flags = [
        "train", f"--out={config.out}", f"--data={config.data}", "--curriculum=32x100000", "--batch-tokens=64",
        "--hidden-size=32", "--num-layers=1", "--num-heads=2", "--num-kv-heads=1", "--intermediate-size=32",
        "--save-every=2", "--eval-every=0", "--log-every=1000", "--threads=1", "--device=cpu", "--quiet",
    ]  # fmt: skip
    source = str(Path(module.__file__).parents[2])
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER.format(full_disk=full_disk), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": source},
        preexec_fn=listen_to_ctrl_c,
    )


def listen_to_ctrl_c():
    """What is started in a shell's background ignores it, and so does all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def assert_whole(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    assert (folder / "optimizer.pt").exists()


def test_ctrl_c_leaves_whole_checkpoints_and_one_line(config):
    process = start(config, full_disk=False)
    assert process.stdout.readline() == "saved\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130
    match = re.fullmatch(
        r"\s*nsa train: interrupted; stopped at step (\d+); continue from \S+-(\d+) with --resume\n", said
    )
    assert match
    assert match[1] == match[2]  # not a step is lost
    found = checkpoints(config.out)
    assert found
    for folder in found:
        assert_whole(folder)
    assert not (config.out / ".partial").exists()


def test_a_full_disk_leaves_the_last_checkpoint_whole_and_one_line(config):
    process = start(config, full_disk=True)
    _, said = process.communicate()
    assert process.returncode == 2
    assert re.fullmatch(r"nsa train: error: the checkpoint could not be written .*checkpoint-2 is whole\n", said)
    assert [folder.name for folder in checkpoints(config.out)] == ["checkpoint-2"]
    assert_whole(config.out / "checkpoint-2")
    assert not (config.out / ".partial").exists()


def test_a_checkpoint_of_another_configuration_is_an_error_that_lists_the_fields(config):
    train(replace(config, curriculum=("32x4",)))
    other = replace(config, resume=True, hidden_size=64, nsa=replace(config.nsa, window_size=8))
    with pytest.raises(ValueError, match="has another configuration") as caught:
        train(other)
    said = str(caught.value)
    assert "hidden_size: 32, now 64" in said
    assert "nsa.window_size: 16, now 8" in said
    assert "curriculum" in said
    assert "\n" not in said
    with pytest.raises(ValueError, match="holds a run already; continue it with --resume or choose another --out"):
        train(config)


def test_nothing_to_resume_is_an_error(config):
    with pytest.raises(ValueError, match="there is no checkpoint in"):
        train(replace(config, resume=True))


def test_what_no_run_can_have_is_an_error_before_anything_is_written(config):
    cases = {
        "curriculum stage '9x': expected": {"curriculum": ("9x",)},
        "num_heads=3": {"num_heads": 3},
        "no such file or folder": {"data": "/nowhere"},
        "data source ''": {"data": ""},
        "too small for one sequence of 99999 tokens": {"curriculum": ("99999x1",)},
        "tokenizer should be bytes, bpe or a folder": {"tokenizer": "words"},
        "batch_tokens should be at least 1, got 0": {"batch_tokens": 0},
    }
    for message, change in cases.items():
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            train(replace(config, **change))
        assert "\n" not in str(caught.value)
    assert not config.out.exists()


def test_presets_are_valid_and_an_unknown_one_is_an_error():
    for name in PRESETS:
        config = preset(name)
        config.validate()
        assert config.preset == name
        assert parse_curriculum(config.curriculum) == config.stages
        assert differences(json.loads(json.dumps(config.to_dict())), config) == []
    with pytest.raises(ValueError, match="unknown preset 'huge'; expected one of demo, small, 1b"):
        preset("huge")


def test_a_tilde_that_the_shell_left_is_the_home_for_all_that_a_run_writes(config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    train(replace(config, out=Path("~/run of home"), curriculum=("32x2",), save_every=2))
    folder = tmp_path / "run of home"
    assert (folder / "model.safetensors").exists()
    assert [one.name for one in checkpoints(folder)] == ["checkpoint-2"]
    assert not (tmp_path / "~").exists()
