"""`nsa eval` from folders to table, JSON and report; and what it says when it cannot."""

import json
from pathlib import Path

import pytest
import torch
from rigged import write_text
from transformers import LlamaConfig, LlamaForCausalLM

from nsa.cli import main
from nsa.eval import pictures
from nsa.eval.command import EvalArguments
from nsa.eval.models import names_of
from nsa.eval.result import Result
from nsa.eval.tasks import TASKS
from nsa.models import NSALlamaConfig, NSALlamaForCausalLM
from nsa.training.tokenizer import byte_tokenizer

SIZES = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2,
         "num_hidden_layers": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}  # fmt: skip
NSA = {"compress_block_size": 16, "compress_stride": 8, "select_block_size": 16, "num_selected_blocks": 4,
       "window_size": 40}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three twins, a plain Llama and held-out text."""
    folder = tmp_path_factory.mktemp("models")
    for attention in ("nsa", "dense", "window", "llama"):
        torch.manual_seed(0)
        if attention == "llama":
            model = LlamaForCausalLM(LlamaConfig(**SIZES))
        else:
            model = NSALlamaForCausalLM(NSALlamaConfig(**SIZES, attention=attention, nsa=NSA))
        model.save_pretrained(folder / attention)
        byte_tokenizer().save_pretrained(folder / attention)
    write_text(folder / "text")
    return folder


def arguments(folder: Path, *names: str, **more) -> EvalArguments:
    small = {"samples": 2, "depths": (0.0, 1.0), "hops": (1,), "text": folder / "text"}
    return EvalArguments(models=tuple(folder / name for name in names), **{**small, **more})


def test_twins_are_judged_into_a_table_json_and_a_report(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pictures, "SAMPLE_TOKENS", 8)
    arguments(folder, "nsa", "dense", "window", output=tmp_path / "out").run()
    printed = capsys.readouterr()
    for words in (
        "nsa",
        "dense",
        "window",
        "needle",
        "recall",
        "perplexity",
        "256 tokens",
        "beyond the stacked windows",
    ):
        assert words in printed.out
    result = Result.from_json((tmp_path / "out" / "eval.json").read_text(encoding="utf-8"))
    assert result.names == ["nsa", "dense", "window"]
    assert result.reference == "dense"
    assert result.tasks["needle"]["lengths"] == [64, 128, 256]
    assert (result.tasks["recall"]["window_size"], result.tasks["recall"]["num_layers"]) == (40, 2)
    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    for section in ("results", "context", "needle", "blocks", "keys", "sample", "run"):
        assert f'<section id="{section}">' in html
    assert "://" not in html


def test_json_goes_to_stdout_alone(folder, capsys):
    arguments(folder, "llama", tasks=("needle",), lengths=(64,), json=True).run()
    data = json.loads(capsys.readouterr().out)
    assert [row["where"] for row in data["rows"]["llama"]] == [
        {"length": 64, "depth": 0.0},
        {"length": 64, "depth": 1.0},
    ]


def test_the_same_command_gives_the_same_numbers(folder, capsys):
    runs = []
    for _ in range(2):
        arguments(folder, "nsa", "window", lengths=(128,), json=True).run()
        data = json.loads(capsys.readouterr().out)
        runs.append((data["rows"], data["tasks"], data["notes"]))
    assert runs[0] == runs[1]


def test_lengths_beyond_the_models_positions_are_noted(folder, capsys):
    arguments(folder, "llama", tasks=("perplexity",), lengths=(300,), json=True).run()
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert notes == ["llama: 300 tokens are more than the 256 positions it was made for"]


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_folder_is_one_clear_line(folder):
    with pytest.raises(ValueError, match=r"no such folder: .*nowhere \(expected a model saved by") as error:
        arguments(folder, "nsa", "nowhere").run()
    one_line(error)


def test_a_folder_without_a_model_is_one_clear_line(folder):
    with pytest.raises(ValueError, match=r"text holds no model: it has no config.json") as error:
        arguments(folder, "text").run()
    one_line(error)


def test_a_file_is_not_a_folder(folder):
    with pytest.raises(ValueError, match=r"config.json is a file; expected the folder of a model"):
        arguments(folder, "nsa/config.json").run()


@pytest.mark.parametrize("config", ["not json", '{"model_type": "nothing_known"}', "{}"])
def test_a_folder_with_a_broken_model_is_one_clear_line(folder, tmp_path, config):
    (tmp_path / "config.json").write_text(config, encoding="utf-8")
    with pytest.raises(ValueError, match="could not be loaded as a causal language model") as error:
        EvalArguments(models=(tmp_path,)).run()
    one_line(error)


def test_a_checkpoint_of_another_configuration_is_one_clear_line(folder, tmp_path):
    for file in (folder / "dense").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": 64, "head_dim": 32}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"the weights do not fit config.json: \d+ missing, \d+ of another") as error:
        EvalArguments(models=(tmp_path,)).run()
    one_line(error)


def test_weights_of_another_attention_are_refused_not_drawn_at_random(folder, tmp_path):
    for file in (folder / "dense").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_bytes((folder / "nsa" / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"the weights do not fit config.json: \d+ missing, 0 of another"):
        EvalArguments(models=(tmp_path,)).run()


def test_an_unknown_task_is_one_clear_line(folder):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        arguments(folder, "nsa", tasks=("needle", "needel")).run()
    assert one_line(error) == f"unknown task needel; expected some of {', '.join(TASKS)}"


@pytest.mark.parametrize(("device", "message"), [("cup", "no such device: 'cup'"), ("cuda:99", "torch sees \\d+ CUDA")])
def test_a_device_that_is_not_there_is_one_clear_line(folder, device, message):
    with pytest.raises(ValueError, match=message) as error:
        arguments(folder, "llama", device=device).run()
    one_line(error)


def test_no_model_is_one_clear_line():
    with pytest.raises(ValueError, match="name at least one model's folder"):
        EvalArguments(models=()).run()


def test_results_are_not_overwritten_unasked(folder, tmp_path):
    (tmp_path / "eval.json").write_text("kept", encoding="utf-8")
    with pytest.raises(ValueError, match=r"already holds eval\.json, .*; give another --output, or --overwrite"):
        arguments(folder, "llama", output=tmp_path).run()
    assert (tmp_path / "eval.json").read_text(encoding="utf-8") == "kept"
    (tmp_path / "eval.json").rename(tmp_path / "report.html")
    with pytest.raises(ValueError, match=r"already holds report\.html"):
        arguments(folder, "llama", output=tmp_path).run()
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == "kept"
    with pytest.raises(ValueError, match=r"report\.html is a file; expected a folder"):
        arguments(folder, "llama", output=tmp_path / "report.html").run()


def test_names_are_as_short_as_they_can_be():
    assert names_of([Path("a/x"), Path("b/y")]) == ["x", "y"]
    assert names_of([Path("/a/x"), Path("/b/x")]) == ["a/x", "b/x"]
    with pytest.raises(ValueError, match="a model is named twice"):
        names_of([Path("/a/x"), Path("/a/../a/x")])


@pytest.mark.parametrize(
    "wrong", [["nowhere"], ["llama", "--tasks", "riddles"], ["llama", "--dtype", "int3"], ["--odd"]]
)
def test_the_command_line_says_what_is_wrong_in_one_line(folder, capsys, wrong):
    known = {"llama": str(folder / "llama"), "nowhere": str(folder / "nowhere")}
    assert main(["eval", *(known.get(word, word) for word in wrong)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("nsa eval: error: ")
    assert printed.err.count("\n") == 1


def test_the_command_line_runs(folder, capsys):
    model, text = str(folder / "llama"), str(folder / "text")
    command = ["eval", model, "--tasks", "needle", "--lengths", "64", "--depths", "0", "1", "--samples", "1", "--json"]
    assert main([*command, "--text", text]) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]["llama"]) == 2
