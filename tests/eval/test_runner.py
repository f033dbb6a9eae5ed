"""`nsa eval` from folders to table, JSON and report; and what it says when it cannot."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rigged import write_text
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from nsa.cli import main, parse
from nsa.eval import pictures
from nsa.eval.arguments import EvalArguments
from nsa.eval.models import device_of, names_of
from nsa.eval.result import Result
from nsa.eval.runner import judge
from nsa.eval.tasks import TASKS
from nsa.models import NSALlamaConfig, NSALlamaForCausalLM
from nsa.training.tokenizer import byte_tokenizer

SIZES = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2,
         "num_hidden_layers": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}  # fmt: skip
NSA = {"compress_block_size": 16, "compress_stride": 8, "select_block_size": 16, "num_selected_blocks": 4,
       "window_size": 40}  # fmt: skip
INFLLM_V2 = {"kernel_size": 16, "kernel_stride": 8, "block_size": 16, "window_size": 16, "topk": 3, "dense_len": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Twins, a plain Llama and held-out text."""
    folder = tmp_path_factory.mktemp("models")
    for attention in ("nsa", "infllm_v2", "dense", "window", "llama"):
        torch.manual_seed(0)
        if attention == "llama":
            model = LlamaForCausalLM(LlamaConfig(**SIZES))
        else:
            config = NSALlamaConfig(**SIZES, attention=attention, nsa=NSA, infllm_v2=INFLLM_V2)
            model = NSALlamaForCausalLM(config)
        model.save_pretrained(folder / attention)
        byte_tokenizer().save_pretrained(folder / attention)
    write_text(folder / "text")
    return folder


def arguments(folder: Path, *names: str, **more) -> EvalArguments:
    small = {"samples": 2, "depths": (0.0, 1.0), "hops": (1,), "text": folder / "text"}
    return EvalArguments(models=tuple(folder / name for name in names), **{**small, **more})


def test_twins_are_judged_into_a_table_json_and_a_report(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pictures, "SAMPLE_TOKENS", 8)
    judge(arguments(folder, "nsa", "dense", "window", output=tmp_path / "out"))
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
    judge(arguments(folder, "llama", tasks=("needle",), lengths=(64,), json=True))
    data = json.loads(capsys.readouterr().out)
    assert [row["where"] for row in data["rows"]["llama"]] == [
        {"length": 64, "depth": 0.0},
        {"length": 64, "depth": 1.0},
    ]


@pytest.mark.parametrize("name", ["nsa", "infllm_v2"])
def test_an_oracle_differs_from_its_model_where_blocks_are_chosen_and_nowhere_else(folder, tmp_path, capsys, name):
    asked = {"tasks": ("perplexity",), "lengths": (256,), "oracle": True, "output": tmp_path / "out"}
    judge(arguments(folder, name, "dense", json=True, **asked))
    found = json.loads(capsys.readouterr().out)
    rows = found["rows"]
    assert list(rows) == [name, "dense", f"{name}, oracle"]
    assert "oracle" not in " ".join(found["notes"])  # the same weights, said once
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("blocks chosen by their exact attention mass") == 1
    losses = {of: {str(row["where"]["positions"]): row["value"] for row in found} for of, found in rows.items()}
    assert losses[name]["[1, 64]"] == losses[f"{name}, oracle"]["[1, 64]"]  # four blocks of 16 are all
    assert losses[name]["[128, 256]"] != losses[f"{name}, oracle"]["[128, 256]"]


def test_an_oracle_without_a_sparse_model_is_refused(folder):
    with pytest.raises(
        ValueError, match="--oracle is for models with attention='nsa' or 'infllm_v2'; dense has 'dense'"
    ):
        judge(arguments(folder, "dense", oracle=True))


def test_the_same_command_gives_the_same_numbers(folder, capsys):
    runs = []
    for _ in range(2):
        judge(arguments(folder, "nsa", "window", lengths=(128,), json=True))
        data = json.loads(capsys.readouterr().out)
        runs.append((data["rows"], data["tasks"], data["notes"]))
    assert runs[0] == runs[1]


def test_lengths_beyond_the_models_positions_are_noted(folder, capsys):
    judge(arguments(folder, "llama", tasks=("perplexity",), lengths=(300,), json=True))
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert notes == ["llama: 300 tokens are more than the 256 positions it was made for"]


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_folder_is_one_clear_line(folder):
    with pytest.raises(ValueError, match=r"no such folder: .*nowhere \(expected a model saved by") as error:
        judge(arguments(folder, "nsa", "nowhere"))
    one_line(error)


def test_a_folder_without_a_model_is_one_clear_line(folder):
    with pytest.raises(ValueError, match=r"text holds no model: it has no config.json") as error:
        judge(arguments(folder, "text"))
    one_line(error)


def test_a_file_is_not_a_folder(folder):
    with pytest.raises(ValueError, match=r"config.json is a file; expected the folder of a model"):
        judge(arguments(folder, "nsa/config.json"))


@pytest.mark.parametrize("config", ["not json", '{"model_type": "nothing_known"}', "{}"])
def test_a_folder_with_a_broken_model_is_one_clear_line(folder, tmp_path, config):
    (tmp_path / "config.json").write_text(config, encoding="utf-8")
    with pytest.raises(ValueError, match="could not be loaded as a causal language model") as error:
        judge(EvalArguments(models=(tmp_path,)))
    one_line(error)


def test_a_checkpoint_of_another_configuration_is_one_clear_line(folder, tmp_path):
    for file in (folder / "dense").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": 64, "head_dim": 32}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"the weights do not fit config.json: \d+ missing, \d+ of another") as error:
        judge(EvalArguments(models=(tmp_path,)))
    one_line(error)


def test_weights_of_another_attention_are_refused_not_drawn_at_random(folder, tmp_path):
    for file in (folder / "dense").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_bytes((folder / "nsa" / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"the weights do not fit config.json: \d+ missing, 0 of another"):
        judge(EvalArguments(models=(tmp_path,)))


@pytest.mark.parametrize(("weights", "changed"), [("nsa", {"attention": "dense"}), ("dense", {"num_hidden_layers": 1})])
def test_weights_that_have_no_place_are_refused_not_left_out(folder, tmp_path, weights, changed):
    model = copy_of(folder / weights, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changed}))
    with pytest.raises(ValueError, match=r"0 missing, 0 of another shape, \d+ without a place"):
        judge(EvalArguments(models=(model,)))


def test_an_unknown_task_is_one_clear_line(folder):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        judge(arguments(folder, "nsa", tasks=("needle", "needel")))
    assert one_line(error) == f"unknown task needel; expected some of {', '.join(TASKS)}"


@pytest.mark.parametrize(
    ("device", "message"),
    [("cup", "no such device: 'cup'"), ("meta", "no such device: 'meta'"), ("cuda:99", "torch sees \\d+ CUDA")],
)
def test_a_device_that_is_not_there_is_one_clear_line(folder, device, message):
    with pytest.raises(ValueError, match=message) as error:
        judge(arguments(folder, "llama", device=device))
    one_line(error)


def test_no_model_is_one_clear_line():
    with pytest.raises(ValueError, match="name at least one model's folder"):
        judge(EvalArguments(models=()))


def test_results_are_not_overwritten_unasked(folder, tmp_path):
    (tmp_path / "eval.json").write_text("kept", encoding="utf-8")
    with pytest.raises(ValueError, match=r"already holds eval\.json, .*; give another --output, or --overwrite"):
        judge(arguments(folder, "llama", output=tmp_path))
    assert (tmp_path / "eval.json").read_text(encoding="utf-8") == "kept"
    (tmp_path / "eval.json").rename(tmp_path / "report.html")
    with pytest.raises(ValueError, match=r"already holds report\.html"):
        judge(arguments(folder, "llama", output=tmp_path))
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == "kept"
    with pytest.raises(ValueError, match=r"report\.html is a file; expected a folder"):
        judge(arguments(folder, "llama", output=tmp_path / "report.html"))


def copy_of(model: Path, folder: Path) -> Path:
    return Path(shutil.copytree(model, folder))


FEW = ["--tasks", "needle", "--lengths", "64", "--depths", "0.5", "--samples", "1"]


def test_results_are_saved_before_anything_is_printed(folder, tmp_path, monkeypatch):
    """A pipe that was closed meanwhile, or a locale without the table's characters, loses no evaluation."""

    whole = Console.print

    def closed(self, *what, **how):
        if self.stderr:  # of the progress before
            return whole(self, *what, **how)
        raise BrokenPipeError

    monkeypatch.setattr(Console, "print", closed)
    monkeypatch.setattr(pictures, "SAMPLE_TOKENS", 2)
    command = ["eval", str(folder / "llama"), *FEW, "--text", str(folder / "text"), "--output", str(tmp_path / "out")]
    assert main(command) == 141
    assert Result.from_json((tmp_path / "out" / "eval.json").read_text(encoding="utf-8")).names == ["llama"]
    assert "</html>" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_names_of_folders_are_text_and_no_markup(folder, tmp_path, monkeypatch, capsys):
    """Neither rich's, which would raise or swallow them, nor HTML's, which would run in the report."""
    monkeypatch.setattr(pictures, "SAMPLE_TOKENS", 2)
    names = ["[red]m", "x[", "<b>&amp;"]
    models = [
        copy_of(folder / kind, tmp_path / name) for kind, name in zip(("nsa", "dense", "llama"), names, strict=True)
    ]
    closing = copy_of(folder / "dense", tmp_path / "a[" / "b]:smile:")  # a path with [/b] in it
    command = ["eval", *map(str, [*models, closing]), *FEW, "--text", str(folder / "text")]
    assert main([*command, "--output", str(tmp_path / "o[" / "b]")]) == 0
    printed = capsys.readouterr()
    assert all(name in printed.out for name in [*names, "b]:smile:"])
    assert f"wrote {tmp_path}/o[/b]/report.html\n" in printed.err
    html = (tmp_path / "o[" / "b]" / "report.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;&amp;amp;" in html
    assert "<b>" not in html


@pytest.mark.parametrize("command", ["eval", "compare"])
def test_python_code_in_a_folder_runs_only_if_it_is_trusted(folder, tmp_path, monkeypatch, capsys, command):
    model, ran = copy_of(folder / "llama", tmp_path / "model"), tmp_path / "ran"
    lines = ["from transformers import LlamaConfig", f"open({str(ran)!r}, 'w').close()"]
    lines += ["class Ours(LlamaConfig):", "    model_type = 'ours'"]
    (model / "code_of_theirs.py").write_text("\n".join(lines))
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "ours", "auto_map": {"AutoConfig": "code_of_theirs.Ours"}}
    (model / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *asked: "yes")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.chdir(tmp_path)
    asked = [command, str(model), "--text", str(folder / "text")]
    assert main(asked) == 2
    assert "which runs only with --trust-remote-code" in capsys.readouterr().err
    assert not ran.exists()
    assert main([*asked, "--trust-remote-code"]) == 2  # the class of the model is not in the folder
    assert ran.exists()


DAMAGED = {
    "config.json": [b"", b"\xff\xfe", b"[]", b"7", b"[" * 100_000, b'{"model_type": 5}', b'{"model_type": "llama"}'],
    "model.safetensors": [b"", b"\0" * 64, b"\xff" * 64, b"\x08" + b"\0" * 7 + b"{}      "],
    "tokenizer.json": [b"", b"{}", b"[]", b'{"model": {"type": "none"}}'],
    "tokenizer_config.json": [b"[]", b"7", b'{"tokenizer_class": 7}'],
    "train_config.json": [b"", b"[]", b"{}", b'{"data": 7}', b"\xff"],
}


@pytest.mark.parametrize(("file", "content"), [(file, content) for file, all in DAMAGED.items() for content in all])
def test_damaged_files_of_a_model_are_one_line(folder, tmp_path, capsys, file, content):
    model = copy_of(folder / "llama", tmp_path / "model")
    (model / file).write_bytes(content)
    text = [] if file == "train_config.json" else ["--text", str(folder / "text")]
    assert main(["eval", str(model), *FEW, *text]) == 2
    said = capsys.readouterr().err
    assert str(model) in said
    assert re.fullmatch(r"nsa eval: error: [^\n]+\n", said)


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "vocab_size", "rope_parameters", "hidden_act"])
@pytest.mark.parametrize("value", ["wide", None, [], {}, -1, 0, 1.5])
def test_values_of_other_types_in_config_json_are_one_line(folder, tmp_path, capsys, key, value):
    model = copy_of(folder / "nsa", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, key: value}))
    code = main(["eval", str(model), *FEW, "--text", str(folder / "text")])
    said = capsys.readouterr().err
    assert (code, said.strip()) == (0, "") or (code == 2 and re.fullmatch(r"nsa eval: error: [^\n]+\n", said))


def test_a_tokenizer_of_another_model_is_one_line(folder, tmp_path):
    model = tmp_path / "model"
    LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": 90})).save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    with pytest.raises(ValueError, match=r"the tokenizer gave token \d+, but the model's vocabulary has 90"):
        judge(EvalArguments(models=(model,), lengths=(64,), samples=1, text=folder / "text"))


def test_texts_longer_than_a_table_of_positions_are_one_line(folder, tmp_path):
    model = tmp_path / "model"
    GPT2LMHeadModel(GPT2Config(vocab_size=259, n_positions=64, n_embd=16, n_layer=1, n_head=1)).save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    with pytest.raises(ValueError, match=r"model: 128 tokens are more than the 64 positions it was made for: index"):
        judge(EvalArguments(models=(model,), lengths=(128,), samples=1, text=folder / "text"))


def test_zero_is_no_window(folder):
    with pytest.raises(ValueError, match="recall: window_size must be positive, got 0"):
        judge(arguments(folder, "nsa", tasks=("recall",), window_size=0))


def test_a_gpu_is_used_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_of(parse("eval", ["x"]).device) == torch.device("cuda")
    assert device_of(parse("compare", ["x"]).device) == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of("auto") == torch.device("cpu")


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
