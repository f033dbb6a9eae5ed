"""`nsa adapt`: a dense twin of `nsa train`, converted at step 0, and what its two stages make of it."""

import json
from dataclasses import replace

import pytest
import torch
from runs import tiny
from transformers import AutoModelForCausalLM, TrainerCallback

import nsa.training.train as training
from nsa.adapting import adapt as module
from nsa.adapting.layers import is_new
from nsa.cli import main
from nsa.eval.runner import text_of
from nsa.eval.text import held_out_texts
from nsa.modules import attention
from nsa.training.corpus import read_corpus
from nsa.training.prepare import train_selectors
from nsa.training.train import train

FLAGS = ["--batch-tokens", "256", "--eval-tokens", "256", "--device", "cpu", "--quiet", "--save-every", "3",
         "--log-every", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The text, a dense twin trained on it, and its conversion, whose queries read few blocks."""
    folder = tmp_path_factory.mktemp("twins")
    (folder / "code.txt").write_text("".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(300)))
    config = replace(tiny(folder / "code.txt", folder), attention="dense", curriculum=("128x40",), learning_rate=3e-3)
    train(replace(config, batch_tokens=512, eval_every=0, save_every=0))
    flags = ["--nsa.num-selected-blocks", "3", "--nsa.window-size", "8", "--tokens", "0"]
    assert main(["convert", str(folder / "run"), str(folder / "sparse"), *flags]) == 0
    return folder


class Stop(TrainerCallback):
    """Ctrl-C in the fifth step."""

    def on_step_end(self, args, state, control, **_):
        if state.global_step == 5:
            raise KeyboardInterrupt


def call(folders, out, *more):
    data = ["--data", str(folders / "code.txt"), "--cache-dir", str(folders / "cache")]
    return main(["adapt", str(folders / "sparse"), "--out", str(out), *data, *FLAGS, *more])


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_the_stages_win_back_what_conversion_lost(folders, tmp_path, capsys):
    out = tmp_path / "out"
    stages = ["--first", "128x20", "--second", "128x6", "--first-rate", "0.01", "--second-rate", "0.001"]
    assert call(folders, out, *stages) == 0
    result = json.loads((out / "adapt.json").read_text())
    loss = {name: losses[0] for name, losses in result["loss"].items()}
    assert list(loss) == ["dense", "converted", "stage-1", "stage-2", "dense-trained"]
    assert loss["converted"] > loss["stage-1"] > loss["stage-2"]
    assert f"{loss['stage-2']:.4f}" in capsys.readouterr().out
    before, first, second = (weights(path) for path in (folders / "sparse", out / "stage-1", out / "stage-2"))
    assert all(torch.equal(first[name], weight) != is_new(f".{name}") for name, weight in before.items()
               if "position" not in name)  # fmt: skip
    assert all(not torch.equal(second[name], weight) for name, weight in before.items() if "q_proj" in name)
    lines = [json.loads(line) for line in (out / "stage-1" / "metrics.jsonl").read_text().splitlines()]
    errors = [line["loss"] for line in lines if "loss" in line]
    assert errors[-1] < errors[0]
    assert main(["report", *(str(out / name) for name in list(loss)[2:]), "--json"]) == 0
    runs = json.loads(capsys.readouterr().out)
    assert [(run["recipe"], run["attention"]) for run in runs] == [
        ("stage-1", "nsa"), ("stage-2", "nsa"), ("dense-trained", "dense")
    ]  # fmt: skip
    # Of 128 tokens, with the converted model's sizes: compressed keys, three blocks of 8, a window of 8.
    sparse = (128 - 4) // 2 + 1 + 3 * 8 + 8
    assert [run["runs"][0]["keys_per_query"] for run in runs] == [sparse, sparse, 128]
    assert main(["generate", str(out / "stage-2"), "--prompt", "def", "--max-new-tokens", "2", "--device", "cpu"]) == 0


def test_selectors_have_their_own_loss_in_stage_2_alone(folders, tmp_path, monkeypatch):
    given, looked_at = [], []

    def note(model, weight, *queries):
        train_selectors(model, weight, *queries)
        given.append([layer.selector_weight for layer in model.modules() if hasattr(layer, "selector_weight")])
        looked_at.append({layer.selector_queries for layer in model.modules() if hasattr(layer, "selector_queries")})

    monkeypatch.setattr(training, "train_selectors", note)
    stages = ["--first", "64x1", "--second", "64x1", "--selector-loss", "0.25", "--selector-queries", "48"]
    assert call(folders, tmp_path / "out", *stages) == 0
    assert looked_at[:4:2] == [{48}, {48}]
    (first, second, twin), after = given[::2], given[1::2]
    assert not any(weight for layers in after for weight in layers)
    assert first == [0.0] * len(first) != []
    assert second == [0.25 / len(second)] * len(first)
    assert set(twin) <= {0.0}


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(folders, tmp_path, monkeypatch, capsys):
    stages = ["--first", "64x4", "--second", "64x6", "--no-twin", "--lora", "2"]
    assert call(folders, tmp_path / "whole", *stages, "--data", "/nowhere") == 2  # which leaves the folder free
    assert call(folders, tmp_path / "whole", *stages) == 0

    def stop(config, **more):
        if config.out.name == "stage-2" and not config.resume:
            more["callbacks"] = [Stop()]
        return train(config, **more)

    monkeypatch.setattr(module, "train", stop)
    assert call(folders, tmp_path / "cut", *stages) == 130
    assert "--resume" in capsys.readouterr().err
    options = tmp_path / "cut" / "adapt_options.json"
    older = {name: value for name, value in json.loads(options.read_text()).items() if not name.startswith("selector")}
    options.write_text(json.dumps(older))
    assert call(folders, tmp_path / "cut", *stages) == 2
    assert "is there and not empty; go on with --resume" in capsys.readouterr().err
    assert call(folders, tmp_path / "cut", *stages, "--resume") == 0
    assert "stage-1 is done" in capsys.readouterr().err
    whole, cut = (weights(tmp_path / name / "stage-2") for name in ("whole", "cut"))
    assert all(torch.equal(cut[name], weight) for name, weight in whole.items())
    assert not any("parametrizations" in name for name in whole)


def test_bfloat16_is_that_of_both_stages(folders, tmp_path, monkeypatch):
    seen = set()
    project = attention.project

    def listen(x, layers):
        found = project(x, layers)
        seen.add((torch.is_grad_enabled(), found[0].dtype))
        return found

    monkeypatch.setattr(attention, "project", listen)
    stages = ["--first", "64x1", "--second", "64x1", "--no-twin", "--dtype", "bfloat16"]
    assert call(folders, tmp_path / "out", *stages) == 0
    assert {dtype for trained, dtype in seen if trained} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--first", "512x3"], "rows of 512 tokens: the model has 128 positions"),
        (["--first", "64"], "curriculum stage '64': expected LENGTHxSTEPS"),
        (["--first"], "nothing to do: expected a curriculum in --first or in --second"),
        (["--second", "--lora", "4"], "--lora 4 is of stage 2: expected a curriculum in --second"),
        (["--lora", "-1"], "--lora: expected 0 or more, and finite, got -1"),
        (["--teacher-weight", "nan"], "--teacher-weight: expected 0 or more, and finite, got nan"),
        (["--dense", "/nowhere"], "/nowhere holds no model"),
        (["--resume"], "--resume: there is no run in"),
        (["--first-rate", "nan"], "learning_rate"),
        (["--data", "/nowhere.txt"], "'/nowhere.txt': no such file"),
    ],
)
def test_a_wrong_option_is_one_line_and_trains_nothing(folders, tmp_path, flags, said, capsys):
    assert call(folders, tmp_path / "out", "--first", "64x1", "--second", *flags) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert said in lines[-1]
    assert not (tmp_path / "out").exists()


def test_text_in_another_field_is_the_held_out_text_too(folders, tmp_path):
    lines = [{"body": "".join(f"def f{i}(x):\n    return x + {i * j}\n" for j in range(9))} for i in range(30)]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ["--first", "64x1", "--second", "--data", str(tmp_path / "lines.jsonl"), "--text-field", "body"]
    assert call(folders, tmp_path / "out", *flags) == 0
    assert json.loads((tmp_path / "out" / "adapt.json").read_text())["length"] == 64
    source = text_of(None, [tmp_path / "out" / "stage-1"])
    kept = read_corpus(str(tmp_path / "lines.jsonl"), 50_000_000, "body").validation
    assert held_out_texts(source) == tuple(document.text for document in kept) != ()


def test_what_is_no_pair_of_models_is_one_line(folders, tmp_path, capsys):
    for dense in ([], ["--dense", str(folders / "run")]):
        assert main(["adapt", str(folders / "run"), *dense, "--out", str(tmp_path / "out")]) == 2
        assert "is not a model that nsa convert made" in capsys.readouterr().err
    assert main(["adapt", "/nowhere", "--out", str(tmp_path / "out")]) == 2
    assert "/nowhere holds no model: there is no such folder" in capsys.readouterr().err
    assert call(folders, tmp_path / "out", "--dense", str(folders / "sparse")) == 2
    assert "attention='nsa'; expected the dense model" in capsys.readouterr().err
