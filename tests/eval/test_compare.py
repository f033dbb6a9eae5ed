"""`nsa compare` from a folder to rows, tables and a report; resumed runs; memory that does not suffice."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rigged import write_text
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from nsa.cli import main
from nsa.config import InfLLMv2Config, NSAConfig
from nsa.eval import compare_run
from nsa.eval.arguments import CompareArguments
from nsa.eval.compare import compare
from nsa.eval.costs import Costs
from nsa.eval.methods import METHODS
from nsa.eval.methods.h2o import H2O
from nsa.eval.methods.minference import MInference
from nsa.eval.methods.nsa import keys_of_last, keys_read
from nsa.eval.result import Result
from nsa.eval.tasks import Continuation
from nsa.models import NSALlamaConfig, NSALlamaForCausalLM
from nsa.models.swap import swap_attention
from nsa.training.tokenizer import byte_tokenizer

SIZES = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4,
         "num_hidden_layers": 3, "num_key_value_heads": 2, "max_position_embeddings": 256}  # fmt: skip
NSA = {"compress_block_size": 16, "compress_stride": 8, "select_block_size": 16, "num_selected_blocks": 4,
       "window_size": 40}  # fmt: skip
INFLLM_V2 = {"kernel_size": 8, "kernel_stride": 4, "block_size": 8, "window_size": 8, "topk": 3, "dense_len": 0}
LAID_OVER = [name for name, method in METHODS.items() if not method.native]
TASKS = ("needle", "recall", "multivalue", "perplexity", "continuation")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compared")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder / "llama")
    NSALlamaForCausalLM(NSALlamaConfig(**SIZES, nsa=NSA)).save_pretrained(folder / "nsa")
    NSALlamaForCausalLM(NSALlamaConfig(**SIZES, attention="infllm_v2", infllm_v2=INFLLM_V2)).save_pretrained(
        folder / "infllm"
    )
    for name in ("llama", "nsa", "infllm"):
        byte_tokenizer().save_pretrained(folder / name)
    write_text(folder / "text")
    return folder


def arguments(folder, output, model="llama", **more):
    small = {"lengths": (128,), "budget": 40, "samples": 1, "depths": (0.5,), "hops": (1,), "values": 2, "decode": 4}
    return CompareArguments(model=folder / model, output=output, text=folder / "text", **{**small, **more})


def records(output):
    return [json.loads(line) for line in (output / "rows.jsonl").read_text().splitlines()]


def test_every_method_is_a_line_of_every_task(folder, tmp_path, capsys):
    compare(arguments(folder, tmp_path))
    said = capsys.readouterr().out
    assert all(word in said for word in (*LAID_OVER, *TASKS, "128 tokens", "decode"))
    (note,) = (line for line in said.splitlines() if "above the budget" in line)
    assert note.startswith("note: above the budget of 40 keys at 128 tokens, by their own rules or sizes, in decode: ")
    # Two of three layers are dense in quest and clusterkv, one in magicpig, all in minference; full has no budget.
    assert {word for word in LAID_OVER if f"{word} " in note.split("decode: ")[1]} == {
        "quest", "clusterkv", "magicpig", "minference"
    }  # fmt: skip
    assert {(r["method"], r["task"]) for r in records(tmp_path)} == {(m, t) for m in LAID_OVER for t in TASKS}
    assert all(r["status"] == "ok" and r["rows"] and r["reads"]["prefill"]["attended"] for r in records(tmp_path))
    result = Result.from_json((tmp_path / "compare.json").read_text(encoding="utf-8"))
    assert (result.names, result.reference) == (LAID_OVER, "full")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(f'<section id="{name}">' in html for name in ("costs", "results", "context", "needle", "run"))
    assert "://" not in html
    tables = (tmp_path / "tables.md").read_text(encoding="utf-8")
    assert {line.split(" | ")[0] for line in tables.splitlines() if line.count("|") == 7} >= {
        f"| {m}" for m in LAID_OVER
    }
    assert (tmp_path / "quality.svg").read_text(encoding="utf-8").count('role="img"') == len(TASKS)
    for record in records(tmp_path):
        reads, positions = record["reads"]["decode"], record["reads"]["decode"]["queries"]
        if record["method"] == "full" and positions:
            assert 100 < reads["attended"] < 128
        if record["method"] in ("exact_top", "streaming_llm", "h2o") and positions:
            assert reads["attended"] == pytest.approx(40)


def test_finished_cells_are_not_run_again(folder, tmp_path, monkeypatch, capsys):
    few = {"methods": ("full", "quest"), "tasks": ("needle", "continuation")}
    compare(arguments(folder, tmp_path, **few))
    before, ran, run_cell = records(tmp_path), [], compare_run.run_cell

    def noted(cell, *rest):
        ran.append((cell.method.name, cell.task.name, cell.length))
        return run_cell(cell, *rest)

    monkeypatch.setattr(compare_run, "run_cell", noted)
    compare(arguments(folder, tmp_path, **few))
    assert not ran
    assert "4 of 4 cells are finished" in " ".join(capsys.readouterr().err.split())
    lines = (tmp_path / "rows.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text(lines[:-50])  # as when the last line was being written
    compare(arguments(folder, tmp_path, **few))
    assert ran == [("quest", "continuation", 128)]
    after = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines() if line.endswith("}")]
    assert [r["rows"] for r in after] == [r["rows"] for r in before]
    ran.clear()
    compare(arguments(folder, tmp_path, **{**few, "lengths": (96, 128), "tasks": ("needle",)}))
    assert ran == [("full", "needle", 96), ("quest", "needle", 96)]
    ran.clear()
    compare(arguments(folder, tmp_path, **{**few, "budget": 60, "tasks": ("needle",)}))
    assert ran == [("quest", "needle", 128)]  # full has no budget
    ran.clear()
    (tmp_path / "text").write_text("another line of text\n" * 400)
    again = {**few, "tasks": ("needle",)}
    compare(replace(arguments(folder, tmp_path, **again), text=tmp_path / "text"))
    assert ran == [("full", "needle", 128), ("quest", "needle", 128)]


def test_processes_give_the_rows_of_one_of_trained_models_too_and_prepare_a_method_once(folder, tmp_path, monkeypatch):
    asked = {"methods": ("quest", "minference"), "tasks": ("needle", "continuation"), "trained": (folder / "infllm",)}
    compare(arguments(folder, tmp_path / "one", **asked))
    compare(arguments(folder, tmp_path / "two", **asked, processes=2))
    one, two = ({r["key"]: r for r in records(tmp_path / name)} for name in ("one", "two"))
    assert one.keys() == two.keys()
    for key, record in one.items():
        assert record.get("prepared") == two[key].get("prepared")
        for row, other in zip(record["rows"], two[key]["rows"], strict=True):
            assert (row["where"], row["n"], row["correct"]) == (other["where"], other["n"], other["correct"])
            # Another process may have another number of threads, and its weights at other addresses.
            assert row["values"] == pytest.approx(other["values"], rel=1e-5)
    assert (
        len({str(record.get("prepared")) for record in one.values()}) == 2
    )  # none for quest, the same for both of the other

    def search(self, model, tokens):
        raise AssertionError("the rows that are finished say which patterns were found")

    monkeypatch.setattr(MInference, "prepare", search)
    compare(arguments(folder, tmp_path / "one", **{**asked, "tasks": ("needle", "continuation", "perplexity")}))


def test_memory_that_does_not_suffice_is_a_row_not_the_end(folder, tmp_path, monkeypatch, capsys):
    def decode(self, q, sequence):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(H2O, "decode", decode)
    few = {"methods": ("full", "h2o", "quest"), "tasks": ("needle", "perplexity")}
    compare(arguments(folder, tmp_path, **few))
    said = capsys.readouterr().out
    assert "h2o: needle at 128 tokens: out of memory" in said
    assert "no result" in said
    status = {(r["method"], r["task"]): r["status"] for r in records(tmp_path)}
    assert status.pop(("h2o", "needle")) == "out of memory"
    assert set(status.values()) == {"ok"}
    assert "h2o: needle at 128 tokens: out of memory" in (tmp_path / "report.html").read_text()

    def broken(self, q, sequence):
        raise RuntimeError("something else")

    monkeypatch.setattr(H2O, "decode", broken)
    with pytest.raises(RuntimeError, match="something else"):
        compare(arguments(folder, tmp_path / "other", **few))


def test_an_nsa_model_is_compared_by_its_own_attention(folder, tmp_path, capsys):
    compare(arguments(folder, tmp_path, model="nsa", tasks=("needle", "continuation"), json=True))
    data = json.loads(capsys.readouterr().out)
    assert list(data["rows"]) == ["nsa"]
    (cost,) = data["costs"]
    attended = cost["attended"]["decode"] / cost["queries"]["decode"]
    assert 13 + 49 + 40 <= attended <= 15 + 64 + 40  # compressed blocks, selected ones of 16 keys, the window


def test_trained_models_are_rows_beside_the_methods_which_read_as_many_keys(folder, tmp_path, monkeypatch, capsys):
    trained = (folder / "nsa", folder / "infllm")
    asked = {"trained": trained, "budget": None, "methods": ("full", "exact_top", "h2o"), "tasks": ("continuation",)}
    compare(arguments(folder, tmp_path, **asked))
    said = " ".join(capsys.readouterr().out.split())
    keys = NSAConfig.from_dict(NSA).keys_per_query(128)
    assert f"128 tokens, budget: {keys} keys a query, as trained nsa reads" in said
    data = json.loads((tmp_path / "compare.json").read_text())
    assert list(data["rows"]) == ["full", "exact_top", "h2o", "trained nsa", "trained infllm"]
    costs = {cost.method: cost for cost in Costs.from_plain(data).rows}
    for name in ("exact_top", "h2o"):  # keys that the model scores to choose do not count as its budget
        assert costs[name].per_query("attended", "decode") == keys
    assert keys - 15 <= costs["trained nsa"].per_query("attended", "decode") <= keys  # its own block is not yet full
    last = InfLLMv2Config.from_dict(INFLLM_V2).keys_per_query(128)
    reads = [costs["trained infllm"].per_query(name, "decode") for name in ("attended", "scored")]
    assert reads[1] > 25  # pooled keys, which no softmax has
    assert last - 8 - 1 <= sum(reads) <= last
    result = Result.from_json((tmp_path / "compare.json").read_text())
    for name, path in zip(("trained nsa", "trained infllm"), trained, strict=True):
        model = AutoModelForCausalLM.from_pretrained(path).eval()
        task = Continuation(**{**result.tasks["continuation"], "length": 128})
        (own,) = task.run(model, byte_tokenizer())
        (row,) = result.rows[name]
        assert row.values == pytest.approx(own.values, rel=1e-4)
    assert all(f"{name}</td>" in (tmp_path / "report.html").read_text() for name in data["rows"])

    ran, run_cell = [], compare_run.run_cell

    def noted(cell, *rest):
        ran.append((cell.row, cell.task.name))
        return run_cell(cell, *rest)

    monkeypatch.setattr(compare_run, "run_cell", noted)
    compare(arguments(folder, tmp_path, **asked, json=True))
    assert not ran
    compare(arguments(folder, tmp_path, **{**asked, "budget": 50}))  # a trained model reads what it was made for
    assert ran == [("exact_top", "continuation"), ("h2o", "continuation")]


def test_models_that_differ_far_behind_in_their_files_are_not_taken_for_each_other(folder, tmp_path):
    model = NSALlamaForCausalLM.from_pretrained(folder / "nsa")
    model.resize_token_embeddings(2 * 2**20 // (4 * 32))  # more than what was once read of a file
    models = [tmp_path / "before", tmp_path / "after"]
    for place in models:
        model.save_pretrained(place)
        byte_tokenizer().save_pretrained(place)
        model.model.norm.weight.data.mul_(2.0)
    before, after = ((place / "model.safetensors").read_bytes()[: 1 << 20] for place in models)
    assert before == after
    losses = []
    for place in models:
        compare(replace(arguments(folder, tmp_path / "out", tasks=("perplexity",)), model=place))
        result = Result.from_json((tmp_path / "out" / "compare.json").read_text(encoding="utf-8"))
        losses.append(result.rows["nsa"][0].value)
    assert losses[0] != losses[1]


def test_lengths_beyond_a_models_positions_are_a_note(folder, tmp_path, capsys):
    asked = {"tasks": ("perplexity",), "methods": ("full",), "trained": (folder / "nsa",)}
    for length, count in ((256, 0), (257, 2)):
        compare(arguments(folder, tmp_path, lengths=(length,), **asked))
        notes = [line for line in capsys.readouterr().out.splitlines() if "positions it was made for" in line]
        assert len(notes) == count
    assert notes[0] == "note: llama: 257 tokens are more than the 256 positions it was made for"
    assert notes[1].startswith("note: trained nsa: 257 tokens")


def test_a_model_trained_on_other_data_is_a_note(folder, tmp_path, capsys):
    for name, data in (("llama", "one"), ("nsa", "another"), ("infllm", "one")):
        shutil.copytree(folder / name, tmp_path / name)
        (tmp_path / name / "data.json").write_text(json.dumps({"data": data}))
    trained = (tmp_path / "nsa", tmp_path / "infllm")
    few = {"methods": ("full",), "tasks": ("continuation",), "trained": trained, "text": folder / "text"}
    compare(replace(arguments(tmp_path, tmp_path / "out"), **few))
    said = capsys.readouterr().out
    assert "note: trained nsa was trained on other data than llama" in said
    assert "infllm was trained on other data" not in said


def test_layers_that_stay_dense_count_with_all_that_they_see(folder, tmp_path):
    torch.manual_seed(0)
    half = NSALlamaForCausalLM(NSALlamaConfig(**SIZES, nsa=NSA, dense_layers=[1])).eval()
    whole = NSALlamaForCausalLM(NSALlamaConfig(**SIZES, nsa=NSA)).eval()
    tokens = torch.randint(259, (128,)).tolist()
    for phase, seen in (("prefill", 112.5 / 2), ("decode", 112 + 8.5)):
        sparse = keys_read(whole, tokens, 16)[phase].attended
        assert keys_read(half, tokens, 16)[phase].attended == pytest.approx((2 * sparse + seen) / 3, abs=0.26)
    assert keys_of_last(half.config, 128) == round((2 * NSAConfig.from_dict(NSA).keys_per_query(128) + 128) / 3)


def test_a_converted_model_that_reads_all_is_its_dense_one_and_every_method_too(folder, tmp_path, capsys):
    dense = Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)).eval()
    sizes = {**NSA, "num_selected_blocks": 8}  # of 16 tokens: all 128
    converted = swap_attention(dense, "nsa", layers={"dense": [0]}, nsa=sizes, gate_bias=30.0)
    for name, model in (("dense", dense), ("nsa", converted)):
        model.save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    asked = {"trained": (tmp_path / "nsa",), "budget": None, "methods": ("full", "streaming_llm")}
    asked |= {"tasks": ("perplexity", "continuation"), "text": folder / "text"}
    compare(replace(arguments(tmp_path, tmp_path / "out", model="dense"), **asked))
    said = capsys.readouterr().out
    assert "tokens, which spares none of them" in said
    assert "budget: every key, as trained nsa reads" in " ".join(said.split())
    rows = Result.from_json((tmp_path / "out" / "compare.json").read_text()).rows
    for name in ("streaming_llm", "trained nsa"):
        for row, full in zip(rows[name], rows["full"], strict=True):
            assert row.values == pytest.approx(full.values, rel=1e-5)


@pytest.mark.parametrize(
    ("model", "trained", "message"),
    [
        ("llama", ["llama"], "expected a model with attention 'nsa' or 'infllm_v2', got 'llama'"),
        ("llama", ["nsa", "nsa"], "a model is named twice"),
        ("nsa", ["infllm"], "--trained: expected a dense MODEL beside them, got"),
        ("llama", ["missing"], "no such folder"),
        ("other", ["nsa"], "expected the tokens of"),
        ("larger", ["nsa"], "(300), got 259; prompts and losses of two vocabularies do not compare"),
    ],
)
def test_what_cannot_stand_beside_the_methods_is_one_line(folder, tmp_path, capsys, model, trained, message):
    if model in ("other", "larger"):
        size = 300 if model == "larger" else 259
        LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": size})).save_pretrained(tmp_path / model)
        tokenizer = byte_tokenizer()
        if model == "other":
            tokenizer.add_tokens(["return"])
        tokenizer.save_pretrained(tmp_path / model)
    first = (tmp_path if model in ("other", "larger") else folder) / model
    command = ["compare", str(first), "--trained", *(str(folder / name) for name in trained)]
    assert main([*command, "--text", str(folder / "text"), "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert message in said[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--methods", "full", "magic"], "unknown method magic; expected some of nsa, infllm_v2, full, exact_top"),
        (["--tasks", "riddle"], "unknown task riddle; expected some of needle, recall"),
        (["--methods", "full", "full"], "named twice: full full"),
        (["--processes", "0"], "expected at least 1 of --processes, got 0"),
        (["--lengths", "0"], "lengths must be positive token counts, got [0]"),
        (["--methods", "nsa"], "the method nsa needs a model that has it (attention='nsa'), got attention=None"),
        (["--budget", "2"], "expected a budget of at least 3 keys"),
        (["--chat", "yes", "--tasks", "needle"], "chat prompts need a tokenizer with a chat template"),
    ],
)
def test_errors_are_one_line(folder, tmp_path, capsys, flags, message):
    text = str(folder / "text")
    command = ["compare", str(folder / "llama"), "--text", text, "--lengths", "128", "--samples", "1",
               "--output", str(tmp_path), *flags]  # fmt: skip
    assert main(command) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in said


def test_a_task_of_lm_eval_without_the_package_says_how_to_get_it(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    command = ["compare", str(folder / "llama"), "--tasks", "lm_eval:arc_easy", "--text", str(folder / "text")]
    assert main([*command, "--lengths", "128", "--output", str(tmp_path)]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said == (
        "nsa compare: error: this needs the package lm_eval, which is not installed: pip install 'lm-eval>=0.4.9'"
    )


def test_damaged_and_foreign_rows_are_run_again_not_believed(folder, tmp_path):
    few = {"methods": ("full",), "tasks": ("needle", "continuation")}
    compare(arguments(folder, tmp_path, **few))
    before = records(tmp_path)
    lines = [{**before[0], "rows": [{**before[0]["rows"][0], "value": "high"}]}, {**before[1], "reads": None}]
    foreign = ["[1, 2]", "7", '{"key": [1]}', "[" * 100_000, "\udcff", *map(json.dumps, lines)]
    (tmp_path / "rows.jsonl").write_bytes("\n".join(foreign).encode(errors="surrogateescape") + b"\n")
    compare(arguments(folder, tmp_path, **few))
    again = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_bytes().splitlines()[-2:]]
    assert [r["rows"] for r in again] == [r["rows"] for r in before]


def test_files_of_another_origin_are_not_overwritten(folder, tmp_path, capsys):
    (tmp_path / "report.html").write_text("mine")
    command = ["compare", str(folder / "llama"), "--text", str(folder / "text"), "--output", str(tmp_path)]
    assert main(command) == 2
    assert f"{tmp_path} already holds report.html, which would be lost" in capsys.readouterr().err
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("report.html", "mine")]
