"""What a person watches: speed and shares in the metrics, Ctrl-C that loses nothing, a run that goes on by its name."""

import json
import os
import shlex
import signal
from dataclasses import replace
from functools import partial

import pytest
import torch
from runs import At, tiny
from safetensors.torch import load_file

from nsa.cli import parse
from nsa.commands.train import run
from nsa.costs.flops import flops_per_token, mean_keys, weights_per_token
from nsa.models import NSALlamaConfig, NSALlamaForCausalLM
from nsa.training.clock import Clock
from nsa.training.config import TrainConfig
from nsa.training.data import FixedBatches
from nsa.training.folder import checkpoints
from nsa.training.generation import GenerateConfig
from nsa.training.info import InfoConfig
from nsa.training.metrics import Progress
from nsa.training.presets import PRESETS
from nsa.training.sizes import model_config
from nsa.training.train import _arguments as arguments_of
from nsa.training.train import _peak, train
from nsa.training.trainer import WholeCheckpointTrainer

pytestmark = pytest.mark.filterwarnings("default")  # the Trainer's own


def ctrl_c(model):
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    config = tiny(text, tmp_path_factory.mktemp("whole"))
    train(config)
    return config


def test_ctrl_c_saves_the_step_at_hand_and_the_name_of_the_run_alone_continues_it(config, whole, capsys):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match=r"stopped at step 7; continue from .*checkpoint-7 with --resume"):
        train(config, callbacks=[At(6, ctrl_c)])  # heard in the step after
    assert signal.getsignal(signal.SIGINT) is before
    assert [path.name for path in checkpoints(config.out)] == ["checkpoint-4", "checkpoint-7"]
    again = parse("train", ["--out", str(config.out), "--resume"])
    assert again == replace(config, resume=True)
    run(again)
    assert capsys.readouterr().out.endswith(f"nsa generate {config.out} --prompt 'def '\n")
    expected, found = (load_file(run.out / "model.safetensors") for run in (whole, config))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_second_ctrl_c_stops_at_once(config):
    with pytest.raises(KeyboardInterrupt, match=r"stopped at step 7; continue from .*checkpoint-4 "):
        train(config, callbacks=[At(7, ctrl_c), At(7, ctrl_c)])


def test_metrics_tell_speed_and_the_share_of_waiting(whole):
    records = [json.loads(line) for line in (whole.out / "metrics.jsonl").read_text().splitlines()]
    told = [record for record in records if "loss" in record]
    tokens = {step: 128 * step for step in range(13)}
    assert [record["tokens"] for record in told] == [tokens[record["step"]] for record in told]
    assert all(record["tokens_per_second"] > 0 and 0 <= record["data_wait"] <= 1 for record in told)
    assert all("mfu" not in record for record in told)  # of a CPU's peak nothing is known
    header = (whole.out / "metrics.csv").read_text().splitlines()[0]
    assert header.endswith("tokens,tokens_per_second,data_wait,mfu")


def test_the_clock_leaves_out_what_is_not_training(monkeypatch):
    now = iter([0.0, 1.0, 1.5, 4.0, 14.0, 18.0, 18.0, 20.0, 20.0]).__next__
    monkeypatch.setattr("time.perf_counter", now)
    clock = Clock(peak=1000.0)  # begins at 0
    with clock.waiting():  # from 1 to 1.5
        clock.count(tokens=80, flops=2000.0)
    with clock.paused():  # from 4 to 14
        pass
    assert clock.lap() == {"tokens_per_second": 10.0, "data_wait": 0.0625, "mfu": 0.25}  # ends at 18, after 8 seconds
    clock.count(tokens=4, flops=0.0)
    assert clock.lap() == {"tokens_per_second": 2.0, "data_wait": 0.0, "mfu": 0.0}  # ends at 20
    assert (clock.seconds, clock.tokens) == (10.0, 84)


def test_the_bar_shows_them(capsys):
    bar = Progress()
    logs = {"loss": 2.0, "tokens_per_second": 12345.6, "mfu": 0.417, "data_wait": 0.25, "grad_norm": 1.0}
    bar.on_log(None, None, None, logs=logs)
    assert bar.shown == {"loss": "2.000", "tokens/s": "12,346", "MFU": "41.7%", "waiting for data": "25%"}
    bar.on_log(None, None, None, logs={"data_wait": 0.001})
    assert "waiting for data" not in bar.shown


def test_workers_make_the_same_batches_in_the_same_order(config):
    seen = {}
    for workers in (0, 2):
        items = [{"input_ids": torch.full((1, 4), number)} for number in range(9)]
        trainer = WholeCheckpointTrainer(
            model=NSALlamaForCausalLM(model_config(config)),
            args=arguments_of(config),
            train_dataset=FixedBatches(items),
            eval_dataset=FixedBatches(items),
            workers=workers,
        )
        seen[workers] = [int(batch["input_ids"][0, 0]) for batch in trainer.get_train_dataloader()]
    assert seen[0] == seen[2] == list(range(9))


@pytest.mark.parametrize("attention", ["nsa", "infllm_v2", "dense", "window"])
@pytest.mark.parametrize("compression", ["mlp", "linear", "mean"])
@pytest.mark.parametrize("shared_kv", [True, False])
def test_operations_are_those_of_weights_and_keys_counted_one_by_one(attention, compression, shared_kv):
    sizes = {"compress_block_size": 8, "compress_stride": 4, "select_block_size": 8, "num_selected_blocks": 4}
    config = NSALlamaConfig(
        attention=attention, vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        nsa=sizes | {"window_size": 5, "compression": compression, "shared_kv": shared_kv},
        infllm_v2={"kernel_size": 8, "kernel_stride": 4, "block_size": 8, "window_size": 5, "topk": 3, "dense_len": 40},
    )  # fmt: skip
    nsa = config.nsa_config
    visible = nsa.num_visible_compressed_blocks

    def listed(position):
        """Three whole blocks where there are so many, and the query's own up to itself."""
        return min(position // 8, 3) * 8 + position % 8 + 1

    for length in (1, 4, 7, 8, 9, 12, 31, 33, 64, 101):
        read = {
            "dense": [i + 1 for i in range(length)],
            "window": [min(i + 1, 5) for i in range(length)],
            "infllm_v2": [i + 1 if i < 40 else listed(i) + visible(i) / 6 for i in range(length)],
            "nsa": [visible(i) + listed(i) + min(i + 1, 5) for i in range(length)],
        }
        assert mean_keys(config)(length) == pytest.approx(sum(read[attention]) / length, rel=1e-12)
        read["infllm_v2"] = read["dense"]
        read["nsa"] = [visible(i) + i + 1 + min(i + 1, 5) for i in range(length)]
        assert mean_keys(config, all_blocks_of=101)(length) == pytest.approx(sum(read[attention]) / length, rel=1e-12)
    if not (attention == "nsa" and compression == "linear"):
        model = NSALlamaForCausalLM(config)
        linears = {name: m.weight.numel() for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        compressing = sum(size for name, size in linears.items() if "phi" in name or "compress" in name)
        own = sum(linears.values()) - compressing + 2 * compressing / nsa.compress_stride  # two heads, a block in four
        assert weights_per_token(config) == pytest.approx(own)
    assert flops_per_token(config, 10.0) == 6 * weights_per_token(config) + 12 * 3 * 32 * 10


def test_a_share_of_the_peak_is_told_only_where_all_operations_of_a_step_are_counted(config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    plain = NSALlamaForCausalLM(model_config(config))
    assert _peak(plain, WholeCheckpointTrainer) == 989e12
    assert _peak(plain, partial(WholeCheckpointTrainer)) is None  # such as one with a teacher
    assert _peak(NSALlamaForCausalLM(model_config(replace(config, num_layers=2, dense_layers=(1,)))),
                 WholeCheckpointTrainer) is None  # fmt: skip
    plain.lm_head.requires_grad_(False)
    assert _peak(plain, WholeCheckpointTrainer) is None


def test_a_presets_model_is_planned_as_it_is_trained(config):
    from nsa.training.info import info
    from nsa.training.prepare import byte_tokenizer, make_model

    demo = make_model(PRESETS["demo"](), byte_tokenizer())
    planned = info(InfoConfig(model="demo", context=512))["plans"]["NSA"]["parameters"]
    assert planned == sum(parameter.numel() for parameter in demo.parameters())
    dense = info(InfoConfig(model="1b"))["plans"]["dense"]["parameters"]
    assert 0.93e9 < dense < 0.94e9


@pytest.mark.parametrize("command", [TrainConfig, GenerateConfig, InfoConfig])
def test_every_example_of_the_help_is_understood(command):
    examples = [line.strip() for line in command.__doc__.split("Examples:")[1].splitlines() if " nsa " in f" {line}"]
    assert len(examples) >= 4
    for example in examples:
        words = shlex.split(example.split("|")[-1].split("<")[0])
        if words[0] == "torchrun":
            words = words[words.index("-m") + 1 :]
        assert words[0] == "nsa"
        parse(words[1], words[2:])


def test_a_reporter_that_is_not_there_is_one_line(config):
    with pytest.raises(ValueError, match="report_to wandb: not installed here; pip install wandb"):
        replace(config, report_to=("wandb",)).validate()
